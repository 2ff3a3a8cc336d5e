"""Bytes that a forward pass keeps for its backward pass, and what that works with besides.

Counted operation by operation in HF's Qwen2.5-VL as it runs here: attention that keeps its output and
one float32 per row and head (`vz_ray.learner.attention`, `vz_ray.learner.vision_tower`), norms that compute in
float32 and keep that copy, an MLP that keeps four intermediates, log-probs by `vz_ray.learner.logprobs`.
"""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.planning.model_shape import ModelShape, TextShape, VisionShape

FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class AttentionMemory:
    """How the learner's packed attention is computed.

    Attributes:
        fused: By FlashAttention, on GPUs in half precision. Elsewhere keys and values are repeated for
            every query head.
        gathered_keys: Keys gathered for FlashAttention per token: each branch has its prefix's keys before its own.
    """

    fused: bool = True
    gathered_keys: float = 1.0

    def saved_bytes(self, text: TextShape, width: int) -> int:
        """Bytes per token and layer: queries, keys and values, log-sum-exps, and the output, which is the
        next projection's input, too."""
        keys = round(self.gathered_keys * text.kv_dim) if self.fused else text.hidden
        return width * (2 * text.hidden + 2 * keys) + FP32_BYTES * text.heads


FUSED_ATTENTION = AttentionMemory()


def text_layer_bytes(text: TextShape, width: int, attention: AttentionMemory = FUSED_ATTENTION) -> int:
    """Bytes that one decoder layer keeps per token.

    Args:
        text: The language model.
        width: Bytes of a number: 2 in bfloat16, 4 in float32.
    """
    norms = 2 * _norm(text.hidden, width)
    return norms + attention.saved_bytes(text, width) + 4 * width * text.intermediate


def vision_block_bytes(vision: VisionShape, width: int) -> int:
    """Bytes that one block of the tower keeps per patch.

    The values are a view of the product that queries and keys came from, too, so that all of it stays.
    """
    norms = 2 * _norm(vision.hidden, width)
    attention = 6 * width * vision.hidden + FP32_BYTES * vision.heads
    return norms + attention + 4 * width * vision.intermediate


def _norm(hidden: int, width: int) -> int:
    """The input as float32, its normalised self, and the scaled output that the next product keeps."""
    return (FP32_BYTES + 2 * width) * hidden


def text_saved_bytes(
    text: TextShape,
    width: int,
    tokens: int,
    *,
    checkpointing: bool,
    attention: AttentionMemory = FUSED_ATTENTION,
) -> int:
    """Bytes of all layers and the last norm; with `checkpointing` each layer's input alone."""
    layer = width * text.hidden if checkpointing else text_layer_bytes(text, width, attention)
    rotary = 2 * width * text.head_dim
    return tokens * (text.layers * layer + rotary + (FP32_BYTES + width) * text.hidden)


def vision_saved_bytes(vision: VisionShape, width: int, patches: int, *, checkpointing: bool) -> int:
    """Bytes of all blocks, the patch projection and the merger."""
    block = width * vision.hidden if checkpointing else vision_block_bytes(vision, width)
    rotary = 2 * FP32_BYTES * (vision.hidden // vision.heads)
    merger = _norm(vision.hidden, width) + 2 * width * vision.hidden
    # Pixels come in float32; another width makes a copy.
    pixels = width * vision.patch_elements
    return patches * (vision.depth * block + rotary + merger + pixels)


def pixel_input_bytes(vision: VisionShape, width: int, patches: int) -> int:
    """Bytes of a micro-batch's pixels beside the copy that `vision_kept` counts."""
    return 0 if width == FP32_BYTES else FP32_BYTES * patches * vision.patch_elements


def layer_workspace_bytes(
    shape: ModelShape,
    width: int,
    tokens: int,
    patches: int,
    *,
    checkpointing: bool,
    attention: AttentionMemory = FUSED_ATTENTION,
) -> int:
    """Bytes that one layer's backward pass works with: gradients of three MLP intermediates and two of
    its inputs, and with `checkpointing` what it kept had it not been recomputed. The larger of a
    decoder layer's and a block's; `patches` is 0 where the tower is frozen."""
    text, vision = shape.text, shape.vision
    decoder = width * (3 * text.intermediate + 2 * text.hidden)
    block = width * (3 * vision.intermediate + 2 * vision.hidden)
    if checkpointing:
        decoder, block = (
            decoder + text_layer_bytes(text, width, attention),
            block + vision_block_bytes(vision, width),
        )
    return max(tokens * decoder, patches * block)


def frozen_tower_bytes(vision: VisionShape, width: int, patches: int) -> int:
    """Bytes that the tower works with where nothing is kept: one block's intermediates."""
    return patches * (width * (3 * vision.intermediate + 2 * vision.hidden) + FP32_BYTES * vision.hidden)


def logits_workspace_bytes(
    text: TextShape, width: int, sampled: int, chunk: int, *, head_trained: bool = True
) -> int:
    """Bytes that log-probs work with at their peak, in the backward pass.

    Of each chunk's `[chunk, vocab]` logits: log-probs, probabilities, a copy without infinities, the
    gradient in `width`, while the next chunk's logits are made in float32 twice over. Where `lm_head`
    is `head_trained`, its float32 gradient adds up meanwhile, to which each chunk brings its own.
    """
    rows = min(sampled, chunk)
    cell = rows * text.vocab_size
    if sampled > chunk:
        logits = (3 * FP32_BYTES + width + 2 * FP32_BYTES) * cell
    else:
        logits = (4 * FP32_BYTES + (width if width != FP32_BYTES else 0)) * cell
    if not head_trained:
        return logits
    weight = text.vocab_size * text.hidden
    return FP32_BYTES * weight + max(logits, (3 * FP32_BYTES + width) * cell + width * weight)


def head_saved_bytes(text: TextShape, width: int, sampled: int) -> int:
    """Bytes of the hidden states of sampled tokens, and three numbers for each."""
    return sampled * (width * text.hidden + 2 * 8 + 2 * FP32_BYTES)
