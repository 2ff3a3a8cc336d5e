"""Models on the meta device, a small trainable model, and counters of live tensor bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.learner.training_data import TEXTS, TrainingData, make_training_data
from vz_ray.learner.batch import MicroBatch, collate
from vz_ray.learner.example import encode_trajectory
from vz_ray.learner.image_inputs import in_memory_pixels
from vz_ray.learner.image_patches import ImageSpec
from vz_ray.learner.packing import PrefixTree
from vz_ray.learner.policy_model import PolicyModel
from vz_ray.needle.tiny_model import TinyModelConfig, build_tiny_model

SHAPE = TinyModelConfig(
    hidden_size=256,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=640,
    vision_hidden_size=128,
    num_vision_layers=3,
    vocab_size=512,
)
"""Wide enough that index tables and positions, which the formulas omit, are negligible."""


def build_on_meta(config: Any) -> Any:
    """Return the HF model of a `Qwen2_5_VLConfig` on the meta device."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.tie_weights()
    return model


def make_wide_training_data(directory: Path) -> TrainingData:
    """Return one group of four samples with frames of 64 patches."""
    model = build_tiny_model(directory, TEXTS, config=SHAPE)
    return make_training_data(model, groups=1, samples=4, overview=12, clip=6, sides=(4,))


def pack_batch(data: TrainingData, policy: PolicyModel) -> MicroBatch:
    """Return all trajectories as one packed sequence."""
    examples = [encode_trajectory(t, policy.tokens, policy.shape.vision.merge_size) for t in data.trajectories]
    trees = [PrefixTree.from_members(range(len(examples)), examples)]
    spec = ImageSpec.from_pretrained(data.model)
    return collate(trees, examples, in_memory_pixels(data.pixels), policy.tokens, spec, policy.hf.device)


def peak_bytes(device: torch.device, call: Callable[[], Any]) -> int:
    """Return the maximum bytes that `call` allocates: of live tensors on the CPU, of the allocator on a GPU."""
    if device.type == "cpu":
        with LiveTensors() as live:
            call()
        return live.peak
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class LiveTensors(TorchDispatchMode):
    """Counts the live bytes of tensors that operations created.

    Attributes:
        peak: Maximum of live bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def now(self) -> int:
        """Return the live bytes."""
        self._seen = {key: entry for key, entry in self._seen.items() if not entry[0].expired()}
        return sum(size for _, size in self._seen.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Unseen inputs were created outside this mode; their views must not be counted either.
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
