"""Which questions of an evaluation set are played: `all | first:N | end:N | random:N | N%`."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import TypeVar

from vz_ray.config.eval import SAMPLING_STRATEGY_PATTERN

T = TypeVar("T")


def subsample(items: Sequence[T], strategy: str, seed: int = 0) -> list[T]:
    """The items that a strategy takes, in their order.

    Args:
        items: All there are.
        strategy: `all`; `first:20` and `end:20`, from that end; `random:20`, drawn; `20%`, a share, drawn.
        seed: Of the draw.

    Raises:
        ValueError: It is none of these.
    """
    match = re.fullmatch(SAMPLING_STRATEGY_PATTERN, strategy)
    if match is None:
        raise ValueError(f"sampling strategy {strategy!r} is none of all, first:N, end:N, random:N, N%")
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
