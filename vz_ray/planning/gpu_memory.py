"""What the memory of a GPU is made of."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from vz_ray.utils.errors import UserError

GIB = 1 << 30
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": GIB}


class Certainty(StrEnum):
    """How a number came about."""

    EXACT = "exact"
    """Follows from shapes."""
    ESTIMATE = "estimate"
    """A formula for what depends on kernels and their order, too."""
    ASSUMED = "assumed"
    """A constant that was not measured."""


class MemoryPhase(StrEnum):
    """While what is done a part is held."""

    ALWAYS = "always"
    FORWARD_BACKWARD = "pass"
    """Forward and backward."""
    OPTIMIZER_STEP = "step"
    """The optimizer's."""
    LOADING = "load"
    """Reading a checkpoint, before anything is sharded."""


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """Bytes of one kind."""

    name: str
    bytes: int
    certainty: Certainty = Certainty.EXACT
    phase: MemoryPhase = MemoryPhase.ALWAYS


@dataclass(frozen=True, slots=True)
class MemoryFootprint:
    """One kind of GPU: what each of `num_gpus` GPUs holds.

    Attributes:
        component: `learner` or `engine`, or both where they share one.
        num_gpus: GPUs of the kind.
        capacity_bytes: Bytes that one has.
        items: What it holds.
    """

    component: str
    num_gpus: int
    capacity_bytes: int
    items: tuple[MemoryItem, ...]

    def bytes_during(self, when: MemoryPhase) -> int:
        """Bytes held at a time; what is always held counts at all times but loading."""
        times = (when,) if when is MemoryPhase.LOADING else (when, MemoryPhase.ALWAYS)
        return sum(part.bytes for part in self.items if part.phase in times)

    @property
    def peak_phase(self) -> MemoryPhase:
        """When it holds most."""
        return max(
            (MemoryPhase.FORWARD_BACKWARD, MemoryPhase.OPTIMIZER_STEP, MemoryPhase.LOADING),
            key=self.bytes_during,
        )

    @property
    def peak_bytes(self) -> int:
        """Most bytes that it holds at one time."""
        return self.bytes_during(self.peak_phase)

    @property
    def bytes_over(self) -> int:
        """Bytes beyond its capacity; negative where there is room."""
        return self.peak_bytes - self.capacity_bytes

    @property
    def fits(self) -> bool:
        return self.bytes_over <= 0


def parse_bytes(text: str) -> int:
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
