"""All the rules, one after another: played episodes in, those to learn from out. Pure.

faults -> pass rate -> evaluation sets -> duplicates -> most of a task -> patterns -> turns
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vz_ray.coldstart.distill.balance import balance
from vz_ray.coldstart.distill.decontaminate import HeldOut, decontaminate, deduplicate
from vz_ray.coldstart.distill.patterns import pattern_of
from vz_ray.coldstart.distill.select import (
    Dropped,
    Sieved,
    by_pass_rate,
    most_per_task,
    pass_rates,
    without_faults,
)
from vz_ray.config.distill import CurateConfig
from vz_ray.data.record import EpisodeRecord


@dataclass(frozen=True, slots=True)
class Curated:
    """Attributes:
    kept: In the order of tasks and attempts.
    dropped: Every other one.
    rates: Share right, by task.
    """

    kept: list[EpisodeRecord]
    dropped: list[Dropped]
    rates: dict[str, float]


def curate(
    records: Sequence[EpisodeRecord],
    config: CurateConfig,
    held_out: HeldOut,
    *,
    max_zoom_frames: int,
    seed: int,
) -> Curated:
    """Which episodes are kept. Balance of turns comes last, so patterns may end a little off theirs."""
    rates = pass_rates(records)
    kept, dropped = list(records), list[Dropped]()
    rules: list[Callable[[list[EpisodeRecord]], Sieved]] = [
        lambda found: without_faults(found, config, max_zoom_frames),
        lambda found: by_pass_rate(found, rates, config),
        lambda found: decontaminate(found, held_out, config.overlap),
        deduplicate,
        lambda found: most_per_task(found, config.per_task),
        lambda found: balance(
            found,
            lambda record: pattern_of(record.trajectory),
            config.most_of_pattern,
            seed=seed,
            reason="enough of the pattern",
        ),
        lambda found: balance(
            found,
            lambda record: len(record.trajectory.turns),
            config.most_of_turns,
            seed=seed,
            reason="enough of as many turns",
        ),
    ]
    for rule in rules:
        kept, left = rule(kept)
        dropped += left
    return Curated(kept, dropped, rates)
