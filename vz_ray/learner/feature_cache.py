"""Features of frames that the vision tower has seen, where the tower does not change."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from vz_ray.learner.example import FrameKey


class FeatureCache:
    """Features by frame, on the host; the least lately used go first.

    Only for a frozen tower: those of a trained one are of weights that are gone.

    Args:
        capacity_bytes: Most that is kept.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity, self._held = capacity_bytes, 0
        self._kept: OrderedDict[FrameKey, Tensor] = OrderedDict()
        self.hits, self.misses = 0, 0

    def get(self, key: FrameKey) -> Tensor | None:
        """`[visual tokens, H]` of a frame, or None; counted."""
        found = self._kept.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return found

    def put(self, keys: Sequence[FrameKey], features: Sequence[Tensor]) -> None:
        """Keeps the features of some frames."""
        for key, rows in zip(keys, features, strict=True):
            if key in self._kept:
                continue
            rows = rows.detach().to("cpu", copy=True)
            self._kept[key] = rows
            self._held += rows.nbytes
        while self._held > self._capacity:
            self._held -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forgets everything."""
        self._kept.clear()
        self._held = 0
