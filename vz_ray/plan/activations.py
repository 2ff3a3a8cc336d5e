"""Bytes that a forward pass keeps for its backward pass, and what that works with besides.

Counted operation by operation in HF's Qwen2.5-VL as it runs here: attention that keeps its output and
one float32 per row and head (`vz_ray.learner.attention`, `vz_ray.learner.vision`), norms that compute in
float32 and keep that copy, an MLP that keeps four intermediates, log-probs by `vz_ray.learner.logprobs`.
"""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.plan.shape import ModelShape, TextShape, VisionShape

FP32 = 4


@dataclass(frozen=True, slots=True)
class Attention:
    """How the learner's packed attention is computed.

    Attributes:
        fused: By FlashAttention, on GPUs in half precision. Elsewhere keys and values are repeated for
            every query head.
        seen: Keys gathered for FlashAttention per token: each branch has its prefix's keys before its own.
    """

    fused: bool = True
    seen: float = 1.0

    def kept(self, text: TextShape, width: int) -> int:
        """Bytes per token and layer: queries, keys and values, log-sum-exps, and the output, which is the
        next projection's input, too."""
        keys = round(self.seen * text.kv) if self.fused else text.hidden
        return width * (2 * text.hidden + 2 * keys) + FP32 * text.heads


FUSED = Attention()


def text_layer(text: TextShape, width: int, attention: Attention = FUSED) -> int:
    """Bytes that one decoder layer keeps per token.

    Args:
        text: The language model.
        width: Bytes of a number: 2 in bfloat16, 4 in float32.
    """
    norms = 2 * _norm(text.hidden, width)
    return norms + attention.kept(text, width) + 4 * width * text.intermediate


def vision_block(vision: VisionShape, width: int) -> int:
    """Bytes that one block of the tower keeps per patch.

    The values are a view of the product that queries and keys came from, too, so that all of it stays.
    """
    norms = 2 * _norm(vision.hidden, width)
    attention = 6 * width * vision.hidden + FP32 * vision.heads
    return norms + attention + 4 * width * vision.intermediate


def _norm(hidden: int, width: int) -> int:
    """The input as float32, its normalised self, and the scaled output that the next product keeps."""
    return (FP32 + 2 * width) * hidden


def text_kept(
    text: TextShape, width: int, tokens: int, *, checkpointing: bool, attention: Attention = FUSED
) -> int:
    """Bytes of all layers and the last norm; with `checkpointing` each layer's input alone."""
    layer = width * text.hidden if checkpointing else text_layer(text, width, attention)
    rotary = 2 * width * text.head
    return tokens * (text.layers * layer + rotary + (FP32 + width) * text.hidden)


def vision_kept(vision: VisionShape, width: int, patches: int, *, checkpointing: bool) -> int:
    """Bytes of all blocks, the patch projection and the merger."""
    block = width * vision.hidden if checkpointing else vision_block(vision, width)
    rotary = 2 * FP32 * (vision.hidden // vision.heads)
    merger = _norm(vision.hidden, width) + 2 * width * vision.hidden
    # Pixels come in float32; another width makes a copy.
    pixels = width * vision.patch_elements
    return patches * (vision.depth * block + rotary + merger + pixels)


def pixel_input(vision: VisionShape, width: int, patches: int) -> int:
    """Bytes of a micro-batch's pixels beside the copy that `vision_kept` counts."""
    return 0 if width == FP32 else FP32 * patches * vision.patch_elements


def layer_at_work(
    shape: ModelShape,
    width: int,
    tokens: int,
    patches: int,
    *,
    checkpointing: bool,
    attention: Attention = FUSED,
) -> int:
    """Bytes that one layer's backward pass works with: gradients of three MLP intermediates and two of
    its inputs, and with `checkpointing` what it kept had it not been recomputed. The larger of a
    decoder layer's and a block's; `patches` is 0 where the tower is frozen."""
    text, vision = shape.text, shape.vision
    decoder = width * (3 * text.intermediate + 2 * text.hidden)
    block = width * (3 * vision.intermediate + 2 * vision.hidden)
    if checkpointing:
        decoder, block = decoder + text_layer(text, width, attention), block + vision_block(vision, width)
    return max(tokens * decoder, patches * block)


def frozen_tower(vision: VisionShape, width: int, patches: int) -> int:
    """Bytes that the tower works with where nothing is kept: one block's intermediates."""
    return patches * (width * (3 * vision.intermediate + 2 * vision.hidden) + FP32 * vision.hidden)


def logits_at_work(text: TextShape, width: int, sampled: int, chunk: int, *, trained: bool = True) -> int:
    """Bytes that log-probs work with at their peak, in the backward pass.

    Of each chunk's `[chunk, vocab]` logits: log-probs, probabilities, a copy without infinities, the
    gradient in `width`, while the next chunk's logits are made in float32 twice over. Where `lm_head`
    is `trained`, its float32 gradient adds up meanwhile, to which each chunk brings its own.
    """
    rows = min(sampled, chunk)
    cell = rows * text.vocab
    if sampled > chunk:
        logits = (3 * FP32 + width + 2 * FP32) * cell
    else:
        logits = (4 * FP32 + (width if width != FP32 else 0)) * cell
    if not trained:
        return logits
    weight = text.vocab * text.hidden
    return FP32 * weight + max(logits, (3 * FP32 + width) * cell + width * weight)


def head_kept(text: TextShape, width: int, sampled: int) -> int:
    """Bytes of the hidden states of sampled tokens, and three numbers for each."""
    return sampled * (width * text.hidden + 2 * 8 + 2 * FP32)
