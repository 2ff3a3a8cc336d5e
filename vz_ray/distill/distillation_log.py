"""Resumable log of teacher episodes."""

from __future__ import annotations

from typing import ClassVar

from vz_ray.data.episode_log import EpisodeLog, episode_key
from vz_ray.data.episode_record import EpisodeRecord


class DistillationLog(EpisodeLog):
    """Log of teacher episodes; the sample index is the attempt at the task."""

    header_key: ClassVar[str] = "distillation"
    mismatch_hint: ClassVar[str] = "choose another name, or delete the log (paid replies are reused)"

    @property
    def records(self) -> list[EpisodeRecord]:
        """Episodes ordered by task and attempt, independent of the order of completion."""
        return sorted(super().records, key=episode_key)
