"""Filter pipeline from teacher episodes to the data set.

faults -> pass rate -> held-out sets -> duplicates -> task limit -> pattern balance -> turn balance
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vz_ray.config.distill import FilterConfig
from vz_ray.data.episode_record import EpisodeRecord
from vz_ray.distill.decontamination import HeldOutSets, decontaminate, deduplicate
from vz_ray.distill.filters import (
    DroppedEpisode,
    FilterResult,
    balance,
    compute_pass_rates,
    filter_by_pass_rate,
    find_fault,
    limit_per_task,
    split_episodes,
)
from vz_ray.distill.zoom_patterns import classify_pattern


@dataclass(frozen=True, slots=True)
class CurationResult:
    """Result of the filter pipeline.

    Attributes:
        kept: Kept episodes, ordered by task and attempt.
        dropped: All other episodes.
        pass_rates: Share of correct answers by task id.
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
    """Apply all filters. Turn balance runs last, so pattern shares may exceed their maximum slightly."""
    rates = compute_pass_rates(records)
    kept, dropped = list(records), list[DroppedEpisode]()
    filters: list[Callable[[list[EpisodeRecord]], FilterResult]] = [
        lambda episodes: split_episodes(episodes, lambda record: find_fault(record, config, max_zoom_frames)),
        lambda episodes: filter_by_pass_rate(episodes, rates, config),
        lambda episodes: decontaminate(episodes, held_out, config.max_ngram_overlap),
        deduplicate,
        lambda episodes: limit_per_task(episodes, config.max_per_task),
        lambda episodes: balance(
            episodes,
            lambda record: classify_pattern(record.trajectory),
            config.max_pattern_share,
            seed=seed,
            reason="pattern limit",
        ),
        lambda episodes: balance(
            episodes,
            lambda record: len(record.trajectory.turns),
            config.max_turns_share,
            seed=seed,
            reason="turn-count limit",
        ),
    ]
    for apply_filter in filters:
        kept, newly_dropped = apply_filter(kept)
        dropped += newly_dropped
    return CurationResult(kept, dropped, rates)
