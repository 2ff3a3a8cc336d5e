"""Comparison of videos and questions with held-out evaluation sets.

Videos match by content hash if both files are readable, otherwise by name. Questions match if their words are
equal, or if enough of their word n-grams occur in one held-out question.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from vz_ray.data.episode_record import EpisodeRecord
from vz_ray.video.errors import VideoError
from vz_ray.video.video_file import compute_video_id, is_url

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VideoIdentity:
    """Identity of a video.

    Attributes:
        content_hash: `blake3:<hex>` of the file; empty if the file is not readable.
        name: File name without folders and extension, in lower case.
    """

    content_hash: str
    name: str


def identify_video(uri: str) -> VideoIdentity:
    """Identify a video without downloading it. Hashes a local file once per process."""
    try:
        return VideoIdentity("" if is_url(uri) else compute_video_id(uri), video_name(uri))
    except VideoError:
        return VideoIdentity("", video_name(uri))


def episode_video_identity(record: EpisodeRecord) -> VideoIdentity:
    """Identify the video from the frames that an episode contains."""
    refs = record.trajectory.frame_refs
    return VideoIdentity(refs[0].video_id if refs else "", video_name(record.task.video))


def video_name(uri: str) -> str:
    """Return the file name of a video without folders and extension, in lower case."""
    path = urlsplit(uri).path if is_url(uri) else uri
    return PurePosixPath(path.replace("\\", "/")).stem.casefold()


def normalize_words(question: str) -> Words:
    """Split a question into case-folded words without punctuation, in Unicode NFKC.

    Example:
        >>> normalize_words("What’s  SHOWN?")
        ('what', 's', 'shown')
    """
    return tuple(re.findall(r"\w+", unicodedata.normalize("NFKC", question).casefold()))


def word_ngrams(words: Words, n: int) -> frozenset[Words]:
    """Return all runs of `n` words, or the whole text if it has fewer words."""
    if not words:
        return frozenset()
    return frozenset(words[i : i + n] for i in range(max(1, len(words) - n + 1)))


class HeldOutSets:
    """Videos and questions of the held-out evaluation sets.

    Args:
        videos: Identities of their videos.
        questions: Their questions.
        ngram_size: Words per n-gram.
    """

    def __init__(self, videos: Iterable[VideoIdentity], questions: Iterable[str], ngram_size: int) -> None:
        self._ngram_size = ngram_size
        videos = list(videos)
        self._contents = {video.content_hash for video in videos if video.content_hash}
        self._names = {video.name for video in videos}
        self._unhashed_names = {video.name for video in videos if not video.content_hash}
        self._words: set[Words] = set()
        self._questions_by_ngram: defaultdict[Words, set[int]] = defaultdict(set)
        for number, question in enumerate(questions):
            words = normalize_words(question)
            self._words.add(words)
            for ngram in word_ngrams(words, ngram_size):
                self._questions_by_ngram[ngram].add(number)

    def has_video(self, video: VideoIdentity) -> bool:
        if video.content_hash:
            return video.content_hash in self._contents or video.name in self._unhashed_names
        return video.name in self._names

    def has_question(self, question: str) -> bool:
        return normalize_words(question) in self._words

    def max_overlap(self, question: str) -> float:
        """Return the largest share of the question's n-grams that occur in one held-out question."""
        ngrams = word_ngrams(normalize_words(question), self._ngram_size)
        matches = Counter(number for ngram in ngrams for number in self._questions_by_ngram.get(ngram, ()))
        return max(matches.values(), default=0) / len(ngrams) if ngrams else 0.0
