"""What the memory of a GPU is made of."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from vz_ray.observe.errors import UserError

GIB = 1 << 30
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": GIB}


class Known(StrEnum):
    """How a number came about."""

    EXACT = "exact"
    """Follows from shapes."""
    ESTIMATE = "estimate"
    """A formula for what depends on kernels and their order, too."""
    ASSUMED = "assumed"
    """A constant that was not measured."""


class When(StrEnum):
    """While what is done a part is held."""

    ALWAYS = "always"
    PASS = "pass"
    """Forward and backward."""
    STEP = "step"
    """The optimizer's."""
    LOAD = "load"
    """Reading a checkpoint, before anything is sharded."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one kind."""

    name: str
    bytes: int
    known: Known = Known.EXACT
    when: When = When.ALWAYS


@dataclass(frozen=True, slots=True)
class Footprint:
    """One kind of GPU: what each of `count` GPUs holds.

    Attributes:
        who: `learner` or `engine`, or both where they share one.
        count: GPUs of the kind.
        capacity: Bytes that one has.
        parts: What it holds.
    """

    who: str
    count: int
    capacity: int
    parts: tuple[Part, ...]

    def during(self, when: When) -> int:
        """Bytes held at a time; what is always held counts at all times but loading."""
        times = (when,) if when is When.LOAD else (when, When.ALWAYS)
        return sum(part.bytes for part in self.parts if part.when in times)

    @property
    def worst(self) -> When:
        """When it holds most."""
        return max((When.PASS, When.STEP, When.LOAD), key=self.during)

    @property
    def peak(self) -> int:
        """Most bytes that it holds at one time."""
        return self.during(self.worst)

    @property
    def over(self) -> int:
        """Bytes beyond its capacity; negative where there is room."""
        return self.peak - self.capacity

    @property
    def fits(self) -> bool:
        return self.over <= 0


def bytes_of(text: str) -> int:
    """A size as people write it: `80GiB`, `80GB`, `24576MiB`.

    Raises:
        UserError: It is none.
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", text)
    unit = found and _UNITS.get(found[2].lower())
    try:
        size = int(float(found[1]) * unit) if found and unit else 0
    except ValueError:
        size = 0
    if size <= 0:
        raise UserError(f"{text!r} is no amount of memory; write it like 80GiB or 80GB")
    return size
