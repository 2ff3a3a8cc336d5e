"""Sampling strategies of an evaluation set: `all | first:N | end:N | random:N | N%`."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import TypeVar

from vz_ray.config.eval import SAMPLING_STRATEGY_PATTERN

T = TypeVar("T")


def subsample(items: Sequence[T], strategy: str, seed: int = 0) -> list[T]:
    """Return the subset of `items` that a strategy selects, in the original order.

    Args:
        items: Items to select from.
        strategy: `all`; `first:20` or `end:20` from either end; `random:20` or `20%` at random.
        seed: Seed of random selections.

    Raises:
        ValueError: `strategy` has another format.
    """
    match = re.fullmatch(SAMPLING_STRATEGY_PATTERN, strategy)
    if match is None:
        raise ValueError(f"sampling strategy is {strategy!r}; it must be all, first:N, end:N, random:N or N%")
    if strategy == "all":
        return list(items)
    if strategy.endswith("%"):
        count = round(len(items) * float(strategy.removesuffix("%")) / 100)
    else:
        count = int(strategy.partition(":")[2])
    count = min(count, len(items))
    if strategy.startswith("first"):
        return list(items[:count])
    if strategy.startswith("end"):
        return list(items[len(items) - count :])
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), count))]
