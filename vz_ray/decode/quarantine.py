"""Quarantine of videos that crash or hang decoders. Pure: no actors, no clock.

    CLEAR --decoder died or hung--> SUSPECT --`threshold` failures in a row--> QUARANTINED
      ^                                |
      +---------- success -------------+

A decoder may die with several requests queued, and each of them becomes a suspect. The pool
retries suspects one at a time, so that only the culprit fails again.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import NamedTuple

from vz_ray.video.errors import VideoQuarantinedError

log = logging.getLogger(__name__)


class DecoderLife(NamedTuple):
    """One process of a decoder slot: the slot and the number of deaths recorded before it."""

    slot: int
    deaths_before: int


class Quarantine:
    """Suspect and quarantined videos of one client.

    Args:
        threshold: Consecutive failures of a video before it is quarantined.

    Attributes:
        reasons: Quarantined videos, with the reason.
    """

    def __init__(self, threshold: int) -> None:
        self._threshold = threshold
        self._deaths: Counter[int] = Counter()
        self._suspects: dict[str, set[DecoderLife]] = {}
        self.reasons: dict[str, str] = {}

    def current_life(self, slot: int) -> DecoderLife:
        """Return the life of the slot to pass to `record_failure` if an attempt kills the decoder."""
        return DecoderLife(slot, self._deaths[slot])

    def is_suspect(self, uri: str) -> bool:
        """Return whether the last attempt for this video killed a decoder."""
        return uri in self._suspects

    def check(self, uri: str) -> None:
        """Raise `VideoQuarantinedError` if the video is quarantined."""
        if uri in self.reasons:
            raise VideoQuarantinedError(f"{uri} is quarantined: {self.reasons[uri]}; convert the video or remove it")

    def record_success(self, uri: str) -> None:
        """Clear the video of suspicion."""
        self._suspects.pop(uri, None)

    def record_failure(self, uri: str, reason: str, life: DecoderLife) -> None:
        """Count a failure that killed a decoder, and quarantine the video at the threshold.

        Requests that fail with the same decoder process share one `life`, so a video is counted
        once per death.
        """
        self._deaths[life.slot] = max(self._deaths[life.slot], life.deaths_before + 1)
        lives = self._suspects.setdefault(uri, set())
        lives.add(life)
        if len(lives) >= self._threshold and uri not in self.reasons:
            self.reasons[uri] = f"{reason}, the last of {len(lives)} consecutive failures"
            log.error("Quarantined video %s: %s", uri, self.reasons[uri])
