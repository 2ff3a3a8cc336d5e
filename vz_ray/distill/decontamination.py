"""What an evaluation set knows is not trained on, and nothing is trained on twice. Pure, but for `identify_video`.

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

from vz_ray.data.episode_record import EpisodeRecord
from vz_ray.distill.filters import DroppedEpisode, FilterResult
from vz_ray.video.errors import VideoError
from vz_ray.video.video_file import compute_video_id, is_url

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VideoIdentity:
    """Attributes:
    content_hash: `blake3:<hex>` of the file; empty where there is none to read.
    name: File name without folders and ending, in small letters.
    """

    content_hash: str
    name: str

    def matches(self, other: VideoIdentity) -> bool:
        if self.content_hash and other.content_hash:
            return self.content_hash == other.content_hash
        return self.name == other.name


def identify_video(uri: str) -> VideoIdentity:
    """What is known of a video without downloading it; a file is read whole, once per process."""
    try:
        return VideoIdentity("" if is_url(uri) else compute_video_id(uri), video_name(uri))
    except VideoError:
        return VideoIdentity("", video_name(uri))


def episode_video_identity(record: EpisodeRecord) -> VideoIdentity:
    """That of the video whose frames an episode showed."""
    refs = record.trajectory.frame_refs
    return VideoIdentity(refs[0].video_id if refs else "", video_name(record.task.video))


def video_name(uri: str) -> str:
    """File name of a video without folders and ending, in small letters."""
    path = urlsplit(uri).path if is_url(uri) else uri
    return PurePosixPath(path.replace("\\", "/")).stem.casefold()


def normalize_words(question: str) -> Words:
    """Its words: no case, no punctuation, one form of each letter.

    Example: `words_of("What’s  SHOWN?") == ("what", "s", "shown")`
    """
    return tuple(re.findall(r"\w+", unicodedata.normalize("NFKC", question).casefold()))


def word_ngrams(words: Words, n: int) -> frozenset[Words]:
    """Every run of `n` words; all of them together where there are fewer."""
    if not words:
        return frozenset()
    return frozenset(words[i : i + n] for i in range(max(1, len(words) - n + 1)))


class HeldOutSets:
    """Evaluation sets, to compare with.

    Args:
        videos: Theirs.
        questions: Theirs.
        ngram: Words in an n-gram.
    """

    def __init__(self, videos: Iterable[VideoIdentity], questions: Iterable[str], ngram: int) -> None:
        self._ngram = ngram
        known = list(videos)
        self._contents = {video.content_hash for video in known if video.content_hash}
        self._names = {video.name for video in known}
        self._unread = {video.name for video in known if not video.content_hash}
        self._words: set[Words] = set()
        self._where: defaultdict[Words, set[int]] = defaultdict(set)
        for number, question in enumerate(questions):
            words = normalize_words(question)
            self._words.add(words)
            for gram in word_ngrams(words, ngram):
                self._where[gram].add(number)

    def has_video(self, video: VideoIdentity) -> bool:
        if video.content_hash:
            return video.content_hash in self._contents or video.name in self._unread
        return video.name in self._names

    def has_question(self, question: str) -> bool:
        return normalize_words(question) in self._words

    def max_overlap(self, question: str) -> float:
        """The largest share of its n-grams that one held-out question has."""
        grams = word_ngrams(normalize_words(question), self._ngram)
        found = Counter(number for gram in grams for number in self._where.get(gram, ()))
        return max(found.values(), default=0) / len(grams) if grams else 0.0


def decontaminate(
    records: Sequence[EpisodeRecord], held_out: HeldOutSets, overlap_threshold: float
) -> FilterResult:
    """Those without a video or a question of an evaluation set; `overlap_threshold` 0 compares no questions."""
    kept, dropped = [], []
    for record in records:
        question, reason = record.task.question, ""
        if held_out.has_video(episode_video_identity(record)):
            reason = "video of an evaluation set"
        elif overlap_threshold and held_out.has_question(question):
            reason = "question of an evaluation set"
        elif overlap_threshold and held_out.max_overlap(question) >= overlap_threshold:
            reason = "nearly a question of an evaluation set"
        if reason:
            dropped.append(DroppedEpisode(str(record.trajectory.id), reason))
        else:
            kept.append(record)
    return kept, dropped


def deduplicate(records: Sequence[EpisodeRecord]) -> FilterResult:
    """One task of every question about a video, whatever its id, and every transcript of it once."""
    owner: dict[tuple[str, Words], str] = {}
    transcripts: set[tuple[str, Words, tuple[Words, ...]]] = set()
    kept, dropped = [], []
    for record in records:
        played = episode_video_identity(record)
        video = played.content_hash or played.name
        asked = (video, normalize_words(record.task.question))
        said = (*asked, tuple(normalize_words(turn.text) for turn in record.trajectory.turns))
        name = str(record.trajectory.id)
        if owner.setdefault(asked, record.task.task_id) != record.task.task_id:
            dropped.append(DroppedEpisode(name, "same question in another task"))
        elif said in transcripts:
            dropped.append(DroppedEpisode(name, "same transcript"))
        else:
            transcripts.add(said)
            kept.append(record)
    return kept, dropped
