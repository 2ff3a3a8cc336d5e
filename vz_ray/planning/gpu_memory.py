"""Memory items of a GPU and their sum per phase."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from vz_ray.utils.errors import UserError

GIB = 1 << 30
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": GIB}


class Certainty(StrEnum):
    """Source of a number."""

    EXACT = "exact"
    """Follows from shapes."""
    ESTIMATE = "estimate"
    """A formula; the true value depends on kernels and their order."""
    ASSUMED = "assumed"
    """A constant that was not measured."""


class MemoryPhase(StrEnum):
    """Phase in which an item is allocated."""

    ALWAYS = "always"
    FORWARD_BACKWARD = "forward and backward"
    OPTIMIZER_STEP = "optimizer step"
    LOADING = "loading"
    """Reading a checkpoint, before sharding."""


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """A named allocation."""

    name: str
    bytes: int
    certainty: Certainty = Certainty.EXACT
    phase: MemoryPhase = MemoryPhase.ALWAYS


@dataclass(frozen=True, slots=True)
class MemoryFootprint:
    """Memory of each GPU of one component.

    Attributes:
        component: `learner`, `engine`, or both if they share a GPU.
        num_gpus: Number of GPUs of the component.
        capacity_bytes: Memory of one GPU.
        items: Allocations on one GPU.
    """

    component: str
    num_gpus: int
    capacity_bytes: int
    items: tuple[MemoryItem, ...]

    def bytes_during(self, phase: MemoryPhase) -> int:
        """Return the bytes held in a phase; items held always count in all phases but loading."""
        phases = (phase,) if phase is MemoryPhase.LOADING else (phase, MemoryPhase.ALWAYS)
        return sum(item.bytes for item in self.items if item.phase in phases)

    @property
    def peak_phase(self) -> MemoryPhase:
        """Phase with the maximum memory."""
        return max(
            (MemoryPhase.FORWARD_BACKWARD, MemoryPhase.OPTIMIZER_STEP, MemoryPhase.LOADING),
            key=self.bytes_during,
        )

    @property
    def peak_bytes(self) -> int:
        """Maximum bytes over all phases."""
        return self.bytes_during(self.peak_phase)

    @property
    def bytes_over(self) -> int:
        """Bytes beyond the capacity; negative if memory is left."""
        return self.peak_bytes - self.capacity_bytes

    @property
    def fits(self) -> bool:
        return self.bytes_over <= 0


def parse_bytes(text: str) -> int:
    """Parse an amount of memory such as `80GiB`, `80GB` or `24576MiB`.

    Raises:
        UserError: `text` has another format or is not positive.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", text)
    unit = match and _UNITS.get(match[2].lower())
    try:
        size = int(float(match[1]) * unit) if match and unit else 0
    except ValueError:
        size = 0
    if size <= 0:
        raise UserError(f"memory is {text!r}; it must be a positive amount such as 80GiB or 80GB")
    return size
