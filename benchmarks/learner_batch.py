"""Synthetic learner input: a group of trajectories of realistic shape, and models of several sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.workload import Workload
from vz_ray.learner.advantages import compute_advantages
from vz_ray.learner.example import Example, SpecialTokenIds
from vz_ray.learner.grpo_loss import loss_weights
from vz_ray.learner.image_patches import ImageSpec
from vz_ray.learner.packing import common_prefix_length
from vz_ray.learner.policy_model import PolicyModel, load_pretrained
from vz_ray.video.frame import RGB, FrameRef

GROUP_SIZE, PREFIX_FRACTION = 16, 0.6
QUESTION_TOKENS, FRAME_LABEL_TOKENS, CLIP_TEXT_TOKENS = 100, 12, 20
"""Tokens of the question, of a frame's timestamp and vision brackets, of the text around a clip."""

TEXT_SIZES: dict[str, dict[str, Any]] = {
    "3b": {"hidden": 2048, "layers": 36, "heads": 16, "kv": 2, "mlp": 11008, "vocab": 151936, "tied": True},
    "7b": {"hidden": 3584, "layers": 28, "heads": 28, "kv": 4, "mlp": 18944, "vocab": 152064, "tied": False},
    "realistic": {"hidden": 1024, "layers": 1, "heads": 8, "kv": 4, "mlp": 3072, "vocab": 1664, "tied": True},
}
"""Text models of Qwen2.5-VL, 3B and 7B, with the same vision tower. `realistic` is for CPUs: a wide layer, so that
matrix products take the time as in large models, with a vocabulary and a tower in proportion."""
_TOWER = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "full": [7, 15, 23, 31]}
_SMALL_TOWER = {"depth": 2, "hidden_size": 192, "num_heads": 3, "intermediate_size": 512, "full": [1]}
_CLIP_STATISTICS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGE, VISION = 151655, (151652, 151653, 151654, 151655, 151656)


@dataclass
class SampleBuilder:
    """Generates random token ids and frames, and stores the pixels by digest."""

    rng: np.random.Generator
    tokens: SpecialTokenIds
    vocab: int
    height: int
    width: int
    pixels: dict[str, RGB]

    @property
    def frame_tokens(self) -> int:
        """Visual tokens of a frame."""
        return self.height * self.width // 28**2

    def text(self, count: int) -> list[int]:
        low = 20 if self.vocab < 100_000 else 0
        return [int(t) for t in self.rng.integers(low, min(self.vocab, 150_000), size=count)]

    def frame(self) -> FrameRef:
        digest = f"frame-{len(self.pixels)}"
        self.pixels[digest] = self.rng.integers(0, 256, (self.height, self.width, 3), dtype=np.uint8)
        return FrameRef("video", "video", 0, 0.0, self.width, self.height, "none", "none", digest)

    def frames(self, count: int) -> tuple[list[int], list[FrameRef]]:
        refs = [self.frame() for _ in range(count)]
        pads = [self.tokens.image] * self.frame_tokens
        return [token for _ in refs for token in (*self.text(FRAME_LABEL_TOKENS), *pads)], refs


@dataclass(frozen=True)
class LearnerBatch:
    """One group: trajectories, pixels by digest, advantages and loss weights."""

    examples: list[Example]
    pixels: dict[str, RGB]
    advantage: np.ndarray
    weight: list[float]

    @property
    def tokens(self) -> int:
        """Tokens of all trajectories; a shared prefix counts for each of them."""
        return sum(e.context_length for e in self.examples)

    @property
    def prefix(self) -> int:
        """Tokens of the shared prefix."""
        return common_prefix_length(self.examples)


def make_group(
    workload: Workload, tokens: SpecialTokenIds, vocab: int, side: int, *, width: int = 0, seed: int = 0
) -> LearnerBatch:
    """Return 16 samples with 0 to 4 clips and a shared prefix of 60 % of the tokens.

    Args:
        workload: Tokens per turn and frames per clip.
        tokens: Special token ids.
        vocab: Size of the vocabulary.
        side: Height of a frame in pixels, a multiple of 28.
        width: Its width, default `side`.
        seed: Seed of ids, pixels and rewards.
    """
    builder = SampleBuilder(np.random.default_rng(seed), tokens, vocab, side, width or side, {})
    shapes = [workload.shape(seed, sample, GROUP_SIZE) for sample in range(GROUP_SIZE)]
    per_frame = FRAME_LABEL_TOKENS + builder.frame_tokens
    branches = [
        sum(s["turn_tokens"]) + per_frame * sum(s["clip_frames"]) + CLIP_TEXT_TOKENS * len(s["clip_frames"])
        for s in shapes
    ]
    prefix = PREFIX_FRACTION / (1 - PREFIX_FRACTION) * float(np.mean(branches))
    ids, refs = builder.frames(max(1, round((prefix - QUESTION_TOKENS) / per_frame)))
    ids += builder.text(QUESTION_TOKENS)
    examples = [_sample(builder, list(ids), list(refs), shape, k) for k, shape in enumerate(shapes)]
    return LearnerBatch(
        examples=examples,
        pixels=builder.pixels,
        advantage=compute_advantages(builder.rng.random(GROUP_SIZE).tolist()),
        weight=loss_weights([len(e.sampled_positions) for e in examples], "sequence_mean", 1),
    )


def _sample(
    builder: SampleBuilder, ids: list[int], refs: list[FrameRef], shape: dict[str, Any], number: int
) -> Example:
    sampled: list[int] = []
    for turn, count in enumerate(shape["turn_tokens"]):
        sampled += range(len(ids), len(ids) + count)
        ids += builder.text(count)
        if turn < len(shape["clip_frames"]):
            clip_ids, clip_refs = builder.frames(shape["clip_frames"][turn])
            ids, refs = ids + clip_ids + builder.text(CLIP_TEXT_TOKENS), refs + clip_refs
    count, visual = len(sampled), np.full(len(refs), builder.frame_tokens)
    slots = np.flatnonzero(np.asarray(ids) == builder.tokens.image)
    return Example(
        name=f"sample {number}",
        group_id="group",
        token_ids=np.asarray(ids, dtype=np.int64),
        sampled_positions=np.asarray(sampled, dtype=np.int64),
        turn_lengths=np.asarray(shape["turn_tokens"], dtype=np.int64),
        engine_logprobs=np.full(count, np.nan, dtype=np.float32),
        temperature=np.ones(count, dtype=np.float32),
        weight_versions=np.zeros(count, dtype=np.int64),
        after_image=np.ones(count, dtype=np.bool_),
        grids=np.tile([1, builder.height // 14, builder.width // 14], (len(refs), 1)),
        image_starts=slots[np.cumsum(visual) - visual],
        image_token_counts=visual,
        refs=tuple(refs),
    )


def load_model(
    shape: str, directory: Path, dtype: torch.dtype, device: torch.device
) -> tuple[Any, SpecialTokenIds, ImageSpec]:
    """Return the HF model: the checkpoint for `tiny`, else random weights created on the device.

    `realistic` has the tokenizer of the checkpoint, so that TRL can load it.
    """
    tokens, mean, std = SpecialTokenIds(IMAGE, 151643, VISION), *_CLIP_STATISTICS
    spec = ImageSpec(14, 2, 2, mean, std, 0, 1 << 40)
    if shape in ("tiny", "realistic"):
        tokens, spec = SpecialTokenIds.from_pretrained(directory), ImageSpec.from_pretrained(directory)
    if shape == "tiny":
        return load_pretrained(directory, dtype).to(device), tokens, spec
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = Qwen2_5_VLForConditionalGeneration(_config(TEXT_SIZES[shape], tokens.image))
        finally:
            torch.set_default_dtype(before)
    return model, tokens, spec


def _config(size: dict[str, Any], image_token: int) -> Any:
    from transformers import Qwen2_5_VLConfig

    text = {
        "hidden_size": size["hidden"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv"],
        "intermediate_size": size["mlp"],
        "vocab_size": size["vocab"],
        "tie_word_embeddings": size["tied"],
        "max_position_embeddings": 128_000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    tower = _TOWER if size["hidden"] > 1024 else _SMALL_TOWER
    vision = {
        **{key: value for key, value in tower.items() if key != "full"},
        "out_hidden_size": size["hidden"],
        "window_size": 112,
        "fullatt_block_indexes": tower["full"],
    }
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=image_token, tie_word_embeddings=size["tied"]
    )


def wrap_policy(hf: Any, tokens: SpecialTokenIds, checkpointing: bool) -> PolicyModel:
    """Wrap a HF model in the learner's policy."""
    policy = PolicyModel(hf, tokens).train()
    if checkpointing:
        policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
    return policy
