"""What an evaluation set knows is not trained on, and nothing is trained on twice. Pure, but for `identity`.

A video is the same if its content is, wherever both files are there to be
read; else if its name is. A question is the same if its words are, or if
enough of its n-grams of words are found in one question of the set.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from vz_ray.coldstart.distill.select import Dropped, Sieved
from vz_ray.data.record import EpisodeRecord
from vz_ray.video.frame import VideoError
from vz_ray.video.source import is_remote, video_id

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VideoIdentity:
    """Attributes:
    content: `blake3:<hex>` of the file; empty where there is none to read.
    name: File name without folders and ending, in small letters.
    """

    content: str
    name: str

    def same(self, other: VideoIdentity) -> bool:
        if self.content and other.content:
            return self.content == other.content
        return self.name == other.name


def identity(uri: str) -> VideoIdentity:
    """What is known of a video without downloading it; a file is read whole, once per process."""
    try:
        return VideoIdentity("" if is_remote(uri) else video_id(uri), name_of(uri))
    except VideoError:
        return VideoIdentity("", name_of(uri))


def played_identity(record: EpisodeRecord) -> VideoIdentity:
    """That of the video whose frames an episode showed."""
    refs = record.trajectory.refs
    return VideoIdentity(refs[0].video_id if refs else "", name_of(record.task.video))


def name_of(uri: str) -> str:
    """File name of a video without folders and ending, in small letters."""
    path = urlsplit(uri).path if is_remote(uri) else uri
    return PurePosixPath(path.replace("\\", "/")).stem.casefold()


def words_of(question: str) -> Words:
    """Its words: no case, no punctuation, one form of each letter.

    Example: `words_of("What’s  SHOWN?") == ("what", "s", "shown")`
    """
    return tuple(re.findall(r"\w+", unicodedata.normalize("NFKC", question).casefold()))


def ngrams_of(words: Words, n: int) -> frozenset[Words]:
    """Every run of `n` words; all of them together where there are fewer."""
    if not words:
        return frozenset()
    return frozenset(words[i : i + n] for i in range(max(1, len(words) - n + 1)))


class HeldOut:
    """Evaluation sets, to compare with.

    Args:
        videos: Theirs.
        questions: Theirs.
        ngram: Words in an n-gram.
    """

    def __init__(self, videos: Iterable[VideoIdentity], questions: Iterable[str], ngram: int) -> None:
        self._ngram = ngram
        known = list(videos)
        self._contents = {video.content for video in known if video.content}
        self._names = {video.name for video in known}
        self._unread = {video.name for video in known if not video.content}
        self._words: set[Words] = set()
        self._where: defaultdict[Words, set[int]] = defaultdict(set)
        for number, question in enumerate(questions):
            words = words_of(question)
            self._words.add(words)
            for gram in ngrams_of(words, ngram):
                self._where[gram].add(number)

    def has_video(self, video: VideoIdentity) -> bool:
        if video.content:
            return video.content in self._contents or video.name in self._unread
        return video.name in self._names

    def has_question(self, question: str) -> bool:
        return words_of(question) in self._words

    def overlap(self, question: str) -> float:
        """The largest share of its n-grams that one held-out question has."""
        grams = ngrams_of(words_of(question), self._ngram)
        found = Counter(number for gram in grams for number in self._where.get(gram, ()))
        return max(found.values(), default=0) / len(grams) if grams else 0.0


def decontaminate(records: Sequence[EpisodeRecord], held_out: HeldOut, overlap: float) -> Sieved:
    """Those without a video or a question of an evaluation set; `overlap` 0 compares no questions."""
    kept, dropped = [], []
    for record in records:
        question, reason = record.task.question, ""
        if held_out.has_video(played_identity(record)):
            reason = "video of an evaluation set"
        elif overlap and held_out.has_question(question):
            reason = "question of an evaluation set"
        elif overlap and held_out.overlap(question) >= overlap:
            reason = "nearly a question of an evaluation set"
        if reason:
            dropped.append(Dropped(str(record.trajectory.id), reason))
        else:
            kept.append(record)
    return kept, dropped


def deduplicate(records: Sequence[EpisodeRecord]) -> Sieved:
    """One task of every question about a video, whatever its id, and every transcript of it once."""
    owner: dict[tuple[str, Words], str] = {}
    transcripts: set[tuple[str, Words, tuple[Words, ...]]] = set()
    kept, dropped = [], []
    for record in records:
        played = played_identity(record)
        video = played.content or played.name
        asked = (video, words_of(record.task.question))
        said = (*asked, tuple(words_of(turn.text) for turn in record.trajectory.turns))
        name = str(record.trajectory.id)
        if owner.setdefault(asked, record.task.task_id) != record.task.task_id:
            dropped.append(Dropped(name, "same question in another task"))
        elif said in transcripts:
            dropped.append(Dropped(name, "same transcript"))
        else:
            transcripts.add(said)
            kept.append(record)
    return kept, dropped
