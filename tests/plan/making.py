"""Models without memory for weights, and a small real one with something to learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.learner.worlds import TEXTS, World, make_world
from vz_ray.coldstart.tiny import TinyShape, build_tiny
from vz_ray.learner.batch import MicroBatch, collate, frames_of
from vz_ray.learner.example import encode
from vz_ray.learner.model import Policy
from vz_ray.learner.packing import Tree
from vz_ray.learner.pixels import PixelSpec

SHAPE = TinyShape(
    hidden=256, layers=3, heads=4, kv_heads=2, intermediate=640, vision_hidden=128, vision_layers=3, vocab=512
)
"""So wide that tables and positions, which formulas leave out, are little beside it."""


def on_meta(config: Any) -> Any:
    """The HF model of a `Qwen2_5_VLConfig`, on the meta device."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.tie_weights()
    return model


def wide_world(directory: Path) -> World:
    """One group of four samples, with frames of 64 patches."""
    model = build_tiny(directory, TEXTS, shape=SHAPE)
    return make_world(model, groups=1, samples=4, overview=12, clip=6, side=(112,))


def batch_of(world: World, policy: Policy) -> MicroBatch:
    """All trajectories of a world as one packed sequence."""
    examples = [encode(t, policy.tokens, policy.merge) for t in world.trajectories]
    trees = [Tree.of(range(len(examples)), examples)]
    spec = PixelSpec.of_checkpoint(world.model)
    return collate(trees, examples, frames_of(world.pixels), policy.tokens, spec, torch.device("cpu"))


class Live(TorchDispatchMode):
    """Bytes that operations made and that still live.

    Attributes:
        peak: The most of them at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def now(self) -> int:
        """Bytes at this time."""
        self._seen = {key: one for key, one in self._seen.items() if not one[0].expired()}
        return sum(size for _, size in self._seen.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What is given was made elsewhere, unless it was seen: a view of it is nothing new.
        self.now()
        for leaf in tree_leaves((args, kwargs)):
            self._note(leaf, counted=False)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            self._note(leaf, counted=True)
        self.peak = max(self.peak, self.now())
        return out

    def _note(self, leaf: Any, *, counted: bool) -> None:
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes() if counted else 0)
