"""A group of trajectories shaped like the paper's, as the learner is given it, and models of any size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.workload import Workload
from vz_ray.learner.advantage import compute_advantages
from vz_ray.learner.example import Example, Ints, SpecialTokenIds
from vz_ray.learner.image_patches import ImageSpec
from vz_ray.learner.loss import loss_weights
from vz_ray.learner.packing import common_prefix_length
from vz_ray.learner.policy_model import PolicyModel, load_pretrained
from vz_ray.video.frame import RGB, FrameRef

SAMPLES, PREFIX_SHARE = 16, 0.6
QUESTION_TOKENS, FRAME_LABEL_TOKENS, CLIP_TEXT_TOKENS = 100, 12, 20
"""Tokens of the question, of a frame's timestamp and its brackets, of what else a reply says."""

TEXT_SIZES: dict[str, dict[str, Any]] = {
    "3b": {"hidden": 2048, "layers": 36, "heads": 16, "kv": 2, "mlp": 11008, "vocab": 151936, "tied": True},
    "7b": {"hidden": 3584, "layers": 28, "heads": 28, "kv": 4, "mlp": 18944, "vocab": 152064, "tied": False},
}
"""Text models of Qwen2.5-VL; the vision tower is the same in both."""
IMAGE, VISION = 151655, (151652, 151653, 151654, 151655, 151656)


@dataclass
class SampleBuilder:
    """Writes ids, and remembers the frames that it invents."""

    rng: np.random.Generator
    tokens: SpecialTokenIds
    vocab: int
    side: int
    pixels: dict[str, RGB]

    def text(self, count: int) -> list[int]:
        low = 20 if self.vocab < 100_000 else 0
        return [int(t) for t in self.rng.integers(low, min(self.vocab, 150_000), size=count)]

    def frame(self) -> FrameRef:
        digest = f"frame-{len(self.pixels)}"
        self.pixels[digest] = self.rng.integers(0, 256, (self.side, self.side, 3), dtype=np.uint8)
        return FrameRef("video", "video", 0, 0.0, self.side, self.side, "none", "none", digest)

    def frames(self, count: int) -> tuple[list[int], list[FrameRef]]:
        refs = [self.frame() for _ in range(count)]
        pads = [self.tokens.image] * (self.side // 28) ** 2
        return [token for _ in refs for token in (*self.text(FRAME_LABEL_TOKENS), *pads)], refs


@dataclass(frozen=True)
class LearnerBatch:
    """One group: its trajectories, their frames, and what GRPO makes of its rewards."""

    examples: list[Example]
    pixels: dict[str, RGB]
    advantage: Ints
    weight: list[float]

    @property
    def tokens(self) -> int:
        """Of all trajectories, a shared prefix counted as often as it is shared."""
        return sum(e.context_length for e in self.examples)

    @property
    def prefix(self) -> int:
        """Tokens that all begin with."""
        return common_prefix_length(self.examples)


def make_group(
    workload: Workload, tokens: SpecialTokenIds, vocab: int, side: int, seed: int = 0
) -> LearnerBatch:
    """Sixteen samples with 0 to 4 clips, whose shared prefix is 60 % of their tokens."""
    writer = SampleBuilder(np.random.default_rng(seed), tokens, vocab, side, {})
    shapes = [workload.shape(seed, sample, SAMPLES) for sample in range(SAMPLES)]
    per_frame = FRAME_LABEL_TOKENS + (side // 28) ** 2
    own = [
        sum(s["turn_tokens"]) + per_frame * sum(s["clip_frames"]) + CLIP_TEXT_TOKENS * len(s["clip_frames"])
        for s in shapes
    ]
    prefix = PREFIX_SHARE / (1 - PREFIX_SHARE) * float(np.mean(own))
    ids, refs = writer.frames(max(1, round((prefix - QUESTION_TOKENS) / per_frame)))
    ids += writer.text(QUESTION_TOKENS)
    examples = [_sample(writer, list(ids), list(refs), shape, k) for k, shape in enumerate(shapes)]
    return LearnerBatch(
        examples=examples,
        pixels=writer.pixels,
        advantage=compute_advantages(writer.rng.random(SAMPLES).tolist()),
        weight=loss_weights([len(e.sampled_positions) for e in examples], "sequence_mean", 1),
    )


def _sample(
    writer: SampleBuilder, ids: list[int], refs: list[FrameRef], shape: dict[str, Any], number: int
) -> Example:
    sampled: list[int] = []
    for turn, count in enumerate(shape["turn_tokens"]):
        sampled += range(len(ids), len(ids) + count)
        ids += writer.text(count)
        if turn < len(shape["clip_frames"]):
            clip, shown = writer.frames(shape["clip_frames"][turn])
            ids, refs = ids + clip + writer.text(CLIP_TEXT_TOKENS), refs + shown
    count, visual = len(sampled), np.full(len(refs), (writer.side // 28) ** 2)
    slots = np.flatnonzero(np.asarray(ids) == writer.tokens.image)
    return Example(
        name=f"sample {number}",
        group_id="group",
        token_ids=np.asarray(ids, dtype=np.int64),
        sampled_positions=np.asarray(sampled, dtype=np.int64),
        engine_logprobs=np.full(count, np.nan, dtype=np.float32),
        temperature=np.ones(count, dtype=np.float32),
        weight_versions=np.zeros(count, dtype=np.int64),
        after_image=np.ones(count, dtype=np.bool_),
        grids=np.tile([1, writer.side // 14, writer.side // 14], (len(refs), 1)),
        image_starts=slots[np.cumsum(visual) - visual],
        image_token_counts=visual,
        refs=tuple(refs),
    )


def load_model(
    shape: str, directory: Path, dtype: torch.dtype, device: torch.device
) -> tuple[Any, SpecialTokenIds, ImageSpec]:
    """The HF model: the checkpoint for `tiny`, else random weights of that size, made on the device."""
    if shape == "tiny":
        tokens, spec = SpecialTokenIds.from_pretrained(directory), ImageSpec.from_pretrained(directory)
        return load_pretrained(directory, dtype).to(device), tokens, spec
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = Qwen2_5_VLForConditionalGeneration(_config(TEXT_SIZES[shape]))
        finally:
            torch.set_default_dtype(before)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    spec = ImageSpec(14, 2, 2, mean, std, 0, 1 << 40)
    return model, SpecialTokenIds(IMAGE, 151643, VISION), spec


def _config(size: dict[str, Any]) -> Any:
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
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "out_hidden_size": size["hidden"],
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, tie_word_embeddings=size["tied"]
    )


def wrap_policy(hf: Any, tokens: SpecialTokenIds, checkpointing: bool) -> PolicyModel:
    """The learner's policy around a HF model."""
    policy = PolicyModel(hf, tokens).train()
    if checkpointing:
        policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
    return policy
