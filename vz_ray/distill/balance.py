"""No kind of episode may crowd out the others. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence

from blake3 import blake3

from vz_ray.data.episode_record import EpisodeRecord
from vz_ray.distill.filters import DroppedEpisode, FilterResult


def max_per_kind(counts: Sequence[int], max_share: float) -> int:
    """The most of one kind that may be kept so that none has more than `max_share` of what is kept.

    Where there are too few kinds for that (two kinds, a share of 0.4), as even as can be.

    Example:
        >>> cap_of([90, 10, 10], 0.5)
        20
    """
    if not counts:
        return 0
    max_share = max(max_share, 1 / len(counts))
    for cap in range(max(counts), 0, -1):
        if min(cap, max(counts)) <= max_share * sum(min(count, cap) for count in counts) + 1e-9:
            return cap
    return min(counts)


def balance(
    records: Sequence[EpisodeRecord],
    kind_of: Callable[[EpisodeRecord], Hashable],
    max_share: float,
    *,
    seed: int,
    reason: str,
) -> FilterResult:
    """Drops from the kinds that have more than `max_share`, by a draw that depends on `seed` and ids alone."""
    counts = Counter(map(kind_of, records))
    cap = max_per_kind(list(counts.values()), max_share)
    by_kind: defaultdict[Hashable, list[EpisodeRecord]] = defaultdict(list)
    for record in records:
        by_kind[kind_of(record)].append(record)
    chosen = {
        str(record.trajectory.id)
        for own in by_kind.values()
        for record in sorted(own, key=lambda record: _lot(record, seed))[:cap]
    }
    kept = [record for record in records if str(record.trajectory.id) in chosen]
    left = [str(record.trajectory.id) for record in records if str(record.trajectory.id) not in chosen]
    return kept, [DroppedEpisode(name, reason) for name in left]


def _lot(record: EpisodeRecord, seed: int) -> str:
    return blake3(f"{seed}/{record.trajectory.id}".encode()).hexdigest()
