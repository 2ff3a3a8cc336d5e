"""Workspace of the backward pass of one layer or vision block, beyond the activations that the forward pass saved.

It holds gradients and, with gradient checkpointing, the recomputed activations; see `activation_memory` for these.
"""

from __future__ import annotations

from itertools import product

from vz_ray.families import TextShape, VisionShape
from vz_ray.planning.activation_memory import (
    FP32_BYTES,
    FUSED_ATTENTION,
    AttentionMemory,
    is_tiled,
    merger_bytes,
    mixer_bytes,
    mlp_bytes,
    text_norm_bytes,
    vision_block_bytes,
)


def layer_workspace_bytes(
    text: TextShape,
    dtype_bytes: int,
    tokens: int,
    *,
    checkpointing: bool,
    attention: AttentionMemory = FUSED_ATTENTION,
    tile_tokens: int = 0,
    mlp_trained: bool = True,
) -> int:
    """Return the workspace of a decoder layer: the maximum over kinds of layers, and over MLP and attention.

    Args:
        text: Shape of the language model.
        dtype_bytes: Size of a number.
        tokens: Tokens of the sequence.
        checkpointing: Whether layers are recomputed.
        attention: Implementation of attention.
        tile_tokens: Maximum tokens of a tile of the MLPs; 0: all tokens at once.
        mlp_trained: Whether gradients of the MLP's weights are summed over tiles.
    """
    norm, maximum = text_norm_bytes(text, dtype_bytes), 0
    # In float32 the input of a layer's first norm is the layer's saved input itself.
    first_norm = norm - (FP32_BYTES * text.hidden if dtype_bytes == FP32_BYTES else 0)
    for linear, experts in product((False, True) if text.linear else (False,), text.mlp_kinds):
        mixer = mixer_bytes(text, dtype_bytes, attention, linear=linear)
        in_mlp = _mlp_workspace(text, dtype_bytes, tokens, tile_tokens, experts=experts, trained=mlp_trained)
        # The MLP's activations are free before the backward pass of attention.
        in_mixer = tokens * _mixer_gradients(text, dtype_bytes, attention, linear=linear)
        saved = 0
        if checkpointing:
            in_mlp += tokens * (first_norm + mixer + norm)
            in_mixer += tokens * (first_norm + mixer)
        elif not is_tiled(tokens, tile_tokens):
            saved = tokens * mlp_bytes(text, dtype_bytes, experts=experts)
        maximum = max(maximum, in_mlp - saved, in_mixer - saved)
    return maximum + tokens * 2 * dtype_bytes * text.hidden


def block_workspace_bytes(vision: VisionShape, dtype_bytes: int, patches: int, *, checkpointing: bool) -> int:
    """Return the workspace of a block of a trained vision tower, less the merger's activations, which are free."""
    block = dtype_bytes * (2 * vision.intermediate + 2 * vision.hidden) - merger_bytes(vision, dtype_bytes)
    if checkpointing:
        block += vision_block_bytes(vision, dtype_bytes)
    return patches * block


def _mlp_workspace(
    text: TextShape, dtype_bytes: int, tokens: int, tile_tokens: int, *, experts: bool, trained: bool
) -> int:
    """Return the bytes of an MLP's activations and their gradients: of two intermediates at a time, with experts of
    three, and of each expert's input and output.

    A tile also has its input's and output's gradients, and the gradients of trained weights and their float32 sums.
    """
    elements, weights = 2 * text.intermediate, text.mlp_weights
    if experts and text.experts:
        elements = 3 * text.experts.token_intermediate + 2 * text.experts.per_token * text.hidden
        weights = text.experts.weights(text.hidden)
    per_token = mlp_bytes(text, dtype_bytes, experts=experts) + dtype_bytes * elements
    if not is_tiled(tokens, tile_tokens):
        return tokens * per_token
    tile = tile_tokens * (per_token + 2 * dtype_bytes * text.hidden)
    return tile + trained * (FP32_BYTES + dtype_bytes) * weights


def _mixer_gradients(text: TextShape, dtype_bytes: int, attention: AttentionMemory, *, linear: bool) -> int:
    """Return the bytes per token of the gradients within attention."""
    if linear and text.linear:
        return dtype_bytes * text.linear.conv_dim
    return attention.gradient_bytes(text, dtype_bytes)
