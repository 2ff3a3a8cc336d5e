"""Bytes that a forward pass saves for its backward pass, and their workspaces.

Counted operation by operation for HF's models with the learner's settings: attention that saves its
output and one float32 per row and head (`vz_ray.learner.attention`, `vz_ray.learner.vision_tower`), norms
that compute in float32 and save that copy, an MLP that saves four intermediates, and log-probs by
`vz_ray.learner.logprobs`. `dtype_bytes` is the size of a number: 2 in bfloat16, 4 in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.families import ModelShape, TextShape, VisionShape

FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class AttentionMemory:
    """Implementation of the learner's packed attention.

    Attributes:
        fused: Whether FlashAttention is used (GPUs, half precision). Otherwise keys and values are repeated
            for every query head.
        gathered_keys: Keys per token that FlashAttention gathers; each branch repeats its prefix's keys.
    """

    fused: bool = True
    gathered_keys: float = 1.0

    def saved_bytes(self, text: TextShape, dtype_bytes: int) -> int:
        """Return bytes per token and layer: queries, keys, values, log-sum-exps and the output."""
        keys = round(self.gathered_keys * text.kv_dim) if self.fused else text.query_dim
        return dtype_bytes * (2 * text.query_dim + 2 * keys) + FP32_BYTES * text.heads


FUSED_ATTENTION = AttentionMemory()


def text_layer_bytes(text: TextShape, dtype_bytes: int, attention: AttentionMemory = FUSED_ATTENTION) -> int:
    """Return the saved bytes per token of one decoder layer."""
    norms = 2 * _norm(text.hidden, dtype_bytes)
    return norms + attention.saved_bytes(text, dtype_bytes) + 4 * dtype_bytes * text.intermediate


def vision_block_bytes(vision: VisionShape, dtype_bytes: int) -> int:
    """Return the saved bytes per patch of one vision block.

    The values are a view of the fused qkv product, so the whole product stays in memory.
    """
    norms = 2 * _norm(vision.hidden, dtype_bytes)
    attention = 6 * dtype_bytes * vision.hidden + FP32_BYTES * vision.heads
    return norms + attention + 4 * dtype_bytes * vision.intermediate


def _norm(hidden: int, dtype_bytes: int) -> int:
    """Return the bytes of a norm: its input in float32, the normalized input, and the scaled output."""
    return (FP32_BYTES + 2 * dtype_bytes) * hidden


def text_saved_bytes(
    text: TextShape,
    dtype_bytes: int,
    tokens: int,
    *,
    checkpointing: bool,
    attention: AttentionMemory = FUSED_ATTENTION,
) -> int:
    """Return the saved bytes of all layers and the last norm; `checkpointing` saves only layer inputs."""
    layer = dtype_bytes * text.hidden if checkpointing else text_layer_bytes(text, dtype_bytes, attention)
    rotary = 2 * dtype_bytes * text.head_dim
    return tokens * (text.layers * layer + rotary + (FP32_BYTES + dtype_bytes) * text.hidden)


def vision_saved_bytes(vision: VisionShape, dtype_bytes: int, patches: int, *, checkpointing: bool) -> int:
    """Return the saved bytes of all blocks, the patch projection and the merger."""
    block = dtype_bytes * vision.hidden if checkpointing else vision_block_bytes(vision, dtype_bytes)
    rotary = 2 * FP32_BYTES * (vision.hidden // vision.heads)
    merger = _norm(vision.hidden, dtype_bytes) + 2 * dtype_bytes * vision.hidden
    # Pixels arrive in float32; another dtype makes a copy.
    pixels = dtype_bytes * vision.patch_elements
    return patches * (vision.depth * block + rotary + merger + pixels)


def pixel_input_bytes(vision: VisionShape, dtype_bytes: int, patches: int) -> int:
    """Return the bytes of the float32 pixels, unless `vision_saved_bytes` already counts them."""
    return 0 if dtype_bytes == FP32_BYTES else FP32_BYTES * patches * vision.patch_elements


def layer_workspace_bytes(
    shape: ModelShape,
    dtype_bytes: int,
    tokens: int,
    patches: int,
    *,
    checkpointing: bool,
    attention: AttentionMemory = FUSED_ATTENTION,
) -> int:
    """Return the workspace of one layer's backward pass: the maximum over decoder layers and vision blocks.

    It holds gradients of three MLP intermediates and two layer inputs, and with `checkpointing` the
    recomputed activations. `patches` is 0 if the vision tower is frozen.
    """
    text, vision = shape.text, shape.vision
    decoder = dtype_bytes * (3 * text.intermediate + 2 * text.hidden)
    block = dtype_bytes * (3 * vision.intermediate + 2 * vision.hidden)
    if checkpointing:
        decoder += text_layer_bytes(text, dtype_bytes, attention)
        block += vision_block_bytes(vision, dtype_bytes)
    return max(tokens * decoder, patches * block)


def frozen_tower_bytes(vision: VisionShape, dtype_bytes: int, patches: int) -> int:
    """Return the workspace of a vision tower without gradients: one block's intermediates."""
    per_patch = dtype_bytes * (3 * vision.intermediate + 2 * vision.hidden) + FP32_BYTES * vision.hidden
    return patches * per_patch


def logits_workspace_bytes(
    text: TextShape, dtype_bytes: int, sampled_tokens: int, chunk: int, *, head_trained: bool = True
) -> int:
    """Return the peak workspace of log-probs, which is in the backward pass.

    Per chunk of logits `[chunk, vocab]`: log-probs, probabilities, a copy without infinities, the gradient
    in the model's dtype, and two float32 copies of the next chunk. If `head_trained`, also the accumulated
    float32 gradient of `lm_head` and the contribution of the current chunk.
    """
    rows = min(sampled_tokens, chunk)
    elements = rows * text.vocab_size
    if sampled_tokens > chunk:
        logits = (3 * FP32_BYTES + dtype_bytes + 2 * FP32_BYTES) * elements
    else:
        logits = (4 * FP32_BYTES + (dtype_bytes if dtype_bytes != FP32_BYTES else 0)) * elements
    if not head_trained:
        return logits
    weight = text.vocab_size * text.hidden
    gradient = (3 * FP32_BYTES + dtype_bytes) * elements + dtype_bytes * weight
    return FP32_BYTES * weight + max(logits, gradient)


def head_saved_bytes(text: TextShape, dtype_bytes: int, sampled_tokens: int) -> int:
    """Return the saved bytes of the sampled tokens: their hidden states and four scalars each."""
    return sampled_tokens * (dtype_bytes * text.hidden + 2 * 8 + 2 * FP32_BYTES)
