"""All the rules, one after another: played episodes in, those to learn from out. Pure.

faults -> pass rate -> evaluation sets -> duplicates -> most of a task -> patterns -> turns
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vz_ray.config.distill import FilterConfig
from vz_ray.data.episode_record import EpisodeRecord
from vz_ray.distill.balance import balance
from vz_ray.distill.decontamination import HeldOutSets, decontaminate, deduplicate
from vz_ray.distill.filters import (
    DroppedEpisode,
    FilterResult,
    compute_pass_rates,
    filter_by_pass_rate,
    filter_faults,
    limit_per_task,
)
from vz_ray.distill.zoom_patterns import classify_pattern


@dataclass(frozen=True, slots=True)
class CurationResult:
    """Attributes:
    kept: In the order of tasks and attempts.
    dropped: Every other one.
    pass_rates: Share right, by task.
    """

    kept: list[EpisodeRecord]
    dropped: list[DroppedEpisode]
    pass_rates: dict[str, float]


def curate(
    records: Sequence[EpisodeRecord],
    config: FilterConfig,
    held_out: HeldOutSets,
    *,
    max_zoom_frames: int,
    seed: int,
) -> CurationResult:
    """Which episodes are kept. Balance of turns comes last, so patterns may end a little off theirs."""
    rates = compute_pass_rates(records)
    kept, dropped = list(records), list[DroppedEpisode]()
    rules: list[Callable[[list[EpisodeRecord]], FilterResult]] = [
        lambda found: filter_faults(found, config, max_zoom_frames),
        lambda found: filter_by_pass_rate(found, rates, config),
        lambda found: decontaminate(found, held_out, config.max_ngram_overlap),
        deduplicate,
        lambda found: limit_per_task(found, config.max_per_task),
        lambda found: balance(
            found,
            lambda record: classify_pattern(record.trajectory),
            config.max_pattern_share,
            seed=seed,
            reason="enough of the pattern",
        ),
        lambda found: balance(
            found,
            lambda record: len(record.trajectory.turns),
            config.max_turns_share,
            seed=seed,
            reason="enough of as many turns",
        ),
    ]
    for rule in rules:
        kept, left = rule(kept)
        dropped += left
    return CurationResult(kept, dropped, rates)
