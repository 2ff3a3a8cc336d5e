"""Small trainable models of each family with random weights, a packed batch, and counters of live tensor bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.families.hf_configs import hf_config
from vz_ray.families import FAMILIES, ExpertsShape, LinearAttentionShape, ModelShape, TextShape, VisionShape
from vz_ray.learner.batch import MicroBatch, collate
from vz_ray.learner.example import Example, SpecialTokenIds
from vz_ray.learner.image_inputs import in_memory_pixels
from vz_ray.learner.image_patches import ImageSpec
from vz_ray.learner.packing import PrefixTree
from vz_ray.learner.policy_model import PolicyModel
from vz_ray.learner.sequence_parallel import SequenceShard
from vz_ray.planning.model_flops import DELTA_RULE_CHUNK
from vz_ray.video.frame import FrameRef

_TEXT = TextShape(256, 3, 4, 2, 64, 640, 512, tie_word_embeddings=True)
_TOWER = VisionShape(
    depth=3, hidden=128, heads=2, intermediate=320, patch_size=16, temporal_patch_size=2, merge_size=2,
    out_hidden=256, position_table=64,
)  # fmt: skip
WIDE_SHAPES = {
    "qwen2_5_vl": ModelShape(
        "qwen2_5_vl",
        replace(_TEXT, qkv_bias=True),
        replace(
            _TOWER, intermediate=256, patch_size=14, window_size=112, full_attention_blocks=(2,), position_table=0,
            gated_mlp=True, norm_bias=False, patch_bias=False,
        ),
    ),
    # Queries are wider than the hidden states.
    "qwen3_vl": ModelShape(
        "qwen3_vl", replace(_TEXT, heads=6, qk_norm=True), replace(_TOWER, deepstack_blocks=(0, 1))
    ),
    "qwen3_vl_moe": ModelShape(
        "qwen3_vl_moe",
        replace(_TEXT, qk_norm=True, experts=ExpertsShape((0, 2), 8, 3, 192)),
        replace(_TOWER, deepstack_blocks=(0, 1)),
    ),
    "qwen3_5": ModelShape(
        "qwen3_5",
        replace(
            _TEXT, layers=4, head_dim=96, qk_norm=True, output_gate=True, float32_norms=True, rotary_share=0.25,
            linear=LinearAttentionShape((0, 1, 2), 2, 4, 64, 64, 4),
        ),
        _TOWER,
    ),
}  # fmt: skip
"""Wide enough that index tables and positions, which the formulas omit, are negligible."""
MODEL_TYPES = tuple(FAMILIES)
"""Families whose passes are measured; one without a row in `WIDE_SHAPES` fails."""
_TOKENS = SpecialTokenIds(image=3, pad=0, vision=(1, 2, 3, 4))
_SIDE = 8
"""Side of a frame in patches."""


def wide_policy(model_type: str, dtype: torch.dtype, *, chunk: int = 64, **options: Any) -> PolicyModel:
    """Return a model of a family with random weights, in training mode; `options` are those of `PolicyModel`."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    config = hf_config(WIDE_SHAPES[model_type])
    hf = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    policy = PolicyModel(hf, _TOKENS, chunk=chunk, **options).train()
    assert policy.shape == WIDE_SHAPES[model_type]
    return policy


def pack_batch(
    policy: PolicyModel, *, samples: int = 4, overview: int = 12, clip: int = 6, shard: SequenceShard | None = None
) -> MicroBatch:
    """Return one group as a packed sequence: a shared overview, and a clip between two turns of each sample."""
    vision, rng = policy.shape.vision, np.random.default_rng(0)
    side, per_frame = _SIDE * vision.patch_size, (_SIDE // vision.merge_size) ** 2
    pixels: dict[str, Any] = {}

    def text(count: int) -> list[int]:
        return [int(token) for token in rng.integers(10, 300, count)]

    def frames(count: int) -> tuple[list[int], list[FrameRef]]:
        digests = [f"frame-{len(pixels) + k}" for k in range(count)]
        pixels.update({digest: rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for digest in digests})
        refs = [FrameRef("video", "video.mp4", 0, 0.0, side, side, "none", "none", digest) for digest in digests]
        return [token for _ in refs for token in (*text(6), *[_TOKENS.image] * per_frame)], refs

    shown, prefix_refs = frames(overview)
    prompt, examples = [*text(40), *shown, *text(20)], []
    for _ in range(samples):
        observation, refs = frames(clip)
        head = [*prompt, *text(20), *text(6), *observation, *text(6)]
        sampled = np.r_[len(prompt) : len(prompt) + 20, len(head) : len(head) + 15]
        examples.append(_example(np.asarray([*head, *text(15)]), sampled, [*prefix_refs, *refs], per_frame))
    trees = [PrefixTree.from_members(range(samples), examples)]
    spec = ImageSpec(
        vision.patch_size, vision.temporal_patch_size, vision.merge_size, (0.5,) * 3, (0.5,) * 3, 1, side**2
    )
    return collate(trees, examples, in_memory_pixels(pixels), _TOKENS, spec, policy.hf.device, shard=shard)


def _example(ids: Any, sampled: Any, refs: list[FrameRef], per_frame: int) -> Example:
    count = len(sampled)
    return Example(
        name="sample",
        group_id="group",
        token_ids=ids,
        sampled_positions=sampled,
        engine_logprobs=np.zeros(count, dtype=np.float32),
        temperature=np.ones(count, dtype=np.float32),
        weight_versions=np.zeros(count, dtype=np.int64),
        after_image=np.zeros(count, dtype=np.bool_),
        turn_lengths=np.asarray([count]),
        grids=np.asarray([(1, _SIDE, _SIDE)] * len(refs)),
        image_starts=np.flatnonzero(ids == _TOKENS.image)[::per_frame],
        image_token_counts=np.full(len(refs), per_frame),
        refs=tuple(refs),
    )


def chunk_padding(batch: MicroBatch) -> float:
    """Return the tokens in chunks of the delta rule per token."""
    lengths = [segment.end - segment.start for segment in batch.layout.segments]
    return sum(-(-length // DELTA_RULE_CHUNK) * DELTA_RULE_CHUNK for length in lengths) / sum(lengths)


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
        self._upper_bound = 0

    def now(self) -> int:
        """Return the live bytes."""
        self._seen = {key: entry for key, entry in self._seen.items() if not entry[0].expired()}
        self._upper_bound = sum(size for _, size in self._seen.values())
        return self._upper_bound

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Unseen inputs were created outside this mode; their views must not be counted either.
        for leaf in tree_leaves((args, kwargs)):
            self._note(leaf, counted=False)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            self._note(leaf, counted=True)
        # The bound includes tensors that were freed since the last count.
        if self._upper_bound > self.peak:
            self.peak = max(self.peak, self.now())
        return out

    def _note(self, leaf: Any, *, counted: bool) -> None:
        if isinstance(leaf, torch.Tensor):
            storage = leaf.untyped_storage()
            if storage._cdata not in self._seen:
                size = storage.nbytes() if counted else 0
                # The weak reference keeps the address from being reused.
                self._seen[storage._cdata] = (StorageWeakRef(storage), size)
                self._upper_bound += size
