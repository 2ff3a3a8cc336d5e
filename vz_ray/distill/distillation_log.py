"""Episodes that an expert has played, on disk; an interrupted distillation goes on where it stopped."""

from __future__ import annotations

from typing import ClassVar

from vz_ray.data.episode_log import EpisodeLog, episode_key
from vz_ray.data.episode_record import EpisodeRecord


class DistillationLog(EpisodeLog):
    """What an expert has played; a sample is an attempt at its task."""

    header_key: ClassVar[str] = "distillation"
    mismatch_hint: ClassVar[str] = (
        "choose another name, or delete it (replies that are paid for stay, and are used again)"
    )

    @property
    def records(self) -> list[EpisodeRecord]:
        """By task and attempt, so that what is made of them does not depend on who ended first."""
        return sorted(super().records, key=episode_key)
