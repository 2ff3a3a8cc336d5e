"""Bytes that a forward pass saves for its backward pass, and their workspaces.

Counted operation by operation for HF's models with the learner's settings: attention that saves its
output and one float32 per row and head (`vz_ray.learner.attention`, `vz_ray.learner.vision_tower`), norms
that compute in float32 and save that copy, an MLP that saves four intermediates (two without a gate), experts
by grouped matrix products, and log-probs by `vz_ray.learner.logprobs`. `dtype_bytes` is the size of a
number: 2 in bfloat16, 4 in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.families import TextShape, VisionShape
from vz_ray.planning import linear_attention_memory

FP32_BYTES = 4
_INTERPOLATION_CORNERS = 4
"""Rows of the position table from which a patch's position embedding is interpolated."""


@dataclass(frozen=True, slots=True)
class AttentionMemory:
    """Implementation of the learner's packed attention.

    Attributes:
        fused: Whether FlashAttention and the kernel of the delta rule are used (GPUs, half precision).
            Otherwise keys and values are repeated for every query head.
        gathered_keys: Keys per token that FlashAttention gathers; each branch repeats its prefix's keys.
        chunk_padding: Tokens per token in the chunks of the delta rule, whose last one is padded in each segment.
        exchanged: Whether ranks share sequences. The output then exists before and after the exchange.
        score_bytes: Workspace of the scores, if they are not computed block by block.
    """

    fused: bool = True
    gathered_keys: float = 1.0
    chunk_padding: float = 1.0
    exchanged: bool = False
    score_bytes: int = 0

    def saved_bytes(self, text: TextShape, dtype_bytes: int) -> int:
        """Return bytes per token and layer of full attention.

        Queries, keys, values, log-sum-exps and the output; inputs of normalized queries and keys; the gate and its
        product with the output. Without FlashAttention the output has the layout of the queries, which are
        concatenated if a part rotates, and is copied.
        """
        keys = round(self.gathered_keys * text.kv_dim) if self.fused else text.query_dim
        saved = dtype_bytes * ((2 + self.exchanged) * text.query_dim + 2 * keys) + FP32_BYTES * text.heads
        if text.qk_norm:
            saved += (FP32_BYTES + _normalized_bytes(text, dtype_bytes)) * (text.query_dim + text.kv_dim)
        if text.output_gate:
            copies = 2 + (not self.fused and text.rotary_share < 1)
            # Float32 queries are a view of the projection that also has the gate.
            copies += text.qk_norm and dtype_bytes == FP32_BYTES
            saved += dtype_bytes * copies * text.query_dim
        return saved

    def gradient_bytes(self, text: TextShape, dtype_bytes: int) -> int:
        """Return bytes per token of the gradients of queries, keys, values and the output.

        FlashAttention has the gradients of the gathered keys and values, and those of each key; an estimate. The
        portable form has float32 sums over segments, and the gradients of the longest one.
        """
        copies = 1 + self.exchanged + text.output_gate
        if not self.fused:
            return (3 * FP32_BYTES + (3 + copies) * dtype_bytes) * text.query_dim
        keys = round(self.gathered_keys * text.kv_dim) + text.kv_dim
        return dtype_bytes * ((1 + copies) * text.query_dim + 2 * keys)


FUSED_ATTENTION = AttentionMemory()


def text_layer_bytes(
    text: TextShape,
    dtype_bytes: int,
    attention: AttentionMemory = FUSED_ATTENTION,
    *,
    linear: bool = False,
    experts: bool = False,
) -> int:
    """Return the saved bytes per token of one decoder layer, with full or `linear` attention, an MLP or `experts`."""
    mixer = mixer_bytes(text, dtype_bytes, attention, linear=linear)
    return 2 * text_norm_bytes(text, dtype_bytes) + mixer + mlp_bytes(text, dtype_bytes, experts=experts)


def mixer_bytes(text: TextShape, dtype_bytes: int, attention: AttentionMemory, *, linear: bool) -> int:
    """Return the saved bytes per token of full or `linear` attention."""
    if linear and text.linear:
        return linear_attention_memory.saved_bytes(
            text.linear, dtype_bytes, kernel=attention.fused, padding=attention.chunk_padding
        )
    return attention.saved_bytes(text, dtype_bytes)


def mlp_bytes(text: TextShape, dtype_bytes: int, *, experts: bool) -> int:
    """Return the saved bytes per token of an MLP or of its experts.

    Experts also save the input and the output of each expert of a token, and the router's float32 probabilities.
    """
    if not (experts and text.experts):
        return 4 * dtype_bytes * text.intermediate
    elements = 4 * text.experts.token_intermediate + 2 * text.experts.per_token * text.hidden
    return dtype_bytes * elements + FP32_BYTES * text.experts.count


def vision_block_bytes(vision: VisionShape, dtype_bytes: int) -> int:
    """Return the saved bytes per patch of one vision block.

    The values are a view of the fused qkv product, so the whole product stays in memory.
    """
    norms = 2 * _vision_norm(vision, vision.hidden, dtype_bytes)
    attention = 6 * dtype_bytes * vision.hidden + FP32_BYTES * vision.heads
    return norms + attention + _mlp_intermediates(vision) * dtype_bytes * vision.intermediate


def _mlp_intermediates(vision: VisionShape) -> int:
    """Return the saved intermediates of a block's MLP: those before and after the activation, and of the gate."""
    return 4 if vision.gated_mlp else 2


def _normalized_bytes(text: TextShape, dtype_bytes: int) -> int:
    """Return the bytes of a normalized number before it is scaled."""
    return FP32_BYTES if text.float32_norms else dtype_bytes


def text_norm_bytes(text: TextShape, dtype_bytes: int) -> int:
    """Return the bytes of a norm: its input in float32, the normalized input, and the scaled output."""
    return (FP32_BYTES + _normalized_bytes(text, dtype_bytes) + dtype_bytes) * text.hidden


def _vision_norm(vision: VisionShape, size: int, dtype_bytes: int) -> int:
    """Return the bytes of a norm: as in the text layers, or input, output and two statistics of a LayerNorm."""
    if vision.norm_bias:
        return 2 * dtype_bytes * size + 2 * FP32_BYTES
    return (FP32_BYTES + 2 * dtype_bytes) * size


def text_saved_bytes(
    text: TextShape,
    dtype_bytes: int,
    tokens: int,
    *,
    checkpointing: bool,
    attention: AttentionMemory = FUSED_ATTENTION,
    tile_tokens: int = 0,
) -> int:
    """Return the saved bytes of all layers and the last norm; `checkpointing` saves only layer inputs.

    An MLP that is computed in tiles saves its input only, which its norm counts.
    """
    if checkpointing:
        layers = text.layers * dtype_bytes * text.hidden
    else:
        layers = text.attention_layers * text_layer_bytes(text, dtype_bytes, attention)
        if text.linear:
            layers += text.linear_layers * text_layer_bytes(text, dtype_bytes, attention, linear=True)
        experts, mlp = (mlp_bytes(text, dtype_bytes, experts=kind) for kind in (True, False))
        layers += text.expert_layers * (experts - mlp)
        if is_tiled(tokens, tile_tokens):
            layers -= text.expert_layers * experts + (text.layers - text.expert_layers) * mlp
    rotary = 2 * dtype_bytes * int(text.rotary_share * text.head_dim)
    return tokens * (layers + rotary + (FP32_BYTES + _normalized_bytes(text, dtype_bytes)) * text.hidden)


def vision_saved_bytes(vision: VisionShape, dtype_bytes: int, patches: int, *, checkpointing: bool) -> int:
    """Return the saved bytes of all blocks, the patch projection, the position embeddings and the mergers.

    The input of a deepstack merger is also the next block's. Includes `feature_bytes`.
    """
    block = dtype_bytes * vision.hidden if checkpointing else vision_block_bytes(vision, dtype_bytes)
    rotary = 2 * FP32_BYTES * (vision.hidden // vision.heads)
    merger = merger_bytes(vision, dtype_bytes)
    deepstack = len(vision.deepstack_blocks) * 3 * dtype_bytes * vision.hidden
    # Indices are int64, weights float32.
    positions = (2 + 1) * FP32_BYTES * _INTERPOLATION_CORNERS if vision.position_table else 0
    # Pixels arrive in float32, see `pixel_input_bytes`; another dtype makes a copy.
    pixels = 0 if dtype_bytes == FP32_BYTES else dtype_bytes * vision.patch_elements
    saved = patches * (vision.depth * block + rotary + merger + deepstack + positions + pixels)
    return saved + feature_bytes(vision, dtype_bytes, patches)


def merger_bytes(vision: VisionShape, dtype_bytes: int) -> int:
    """Return the saved bytes per patch of the merger, which is the tower's last operation."""
    return _vision_norm(vision, vision.hidden, dtype_bytes) + 2 * dtype_bytes * vision.hidden


def feature_bytes(vision: VisionShape, dtype_bytes: int, patches: int) -> int:
    """Return the bytes of the features of all levels, which replace embeddings; frames that appear once."""
    return dtype_bytes * patches // vision.merge_size**2 * vision.feature_levels * vision.out_hidden


def pixel_input_bytes(vision: VisionShape, patches: int) -> int:
    """Return the bytes of the float32 pixels, which exist until the end of a pass."""
    return FP32_BYTES * patches * vision.patch_elements


def slice_table_bytes(vision: VisionShape, patches: int) -> int:
    """Return the bytes of rotary tables of recomputed slices, which gradient checkpointing of the blocks keeps."""
    return 2 * FP32_BYTES * (vision.hidden // vision.heads) * patches


def is_tiled(tokens: int, tile_tokens: int) -> bool:
    """Return whether the MLPs of a sequence are computed in tiles."""
    return 0 < tile_tokens < tokens


def frozen_tower_bytes(vision: VisionShape, dtype_bytes: int, patches: int) -> int:
    """Return the workspace of a vision tower without gradients: MLP or rotary embedding of one block.

    The rotary embedding is in float32. The float32 position embeddings and the features of deepstack stay alive.
    """
    float32_copies = 0 if dtype_bytes == FP32_BYTES else 2
    attention = (5 * dtype_bytes + (4 + float32_copies) * FP32_BYTES) * vision.hidden
    positions = FP32_BYTES * vision.hidden if vision.position_table else 0
    rotary = 2 * FP32_BYTES * (vision.hidden // vision.heads)
    deepstack = dtype_bytes * len(vision.deepstack_blocks) * vision.out_hidden // vision.merge_size**2
    return patches * (max(block_mlp_bytes(vision, dtype_bytes), attention) + positions + rotary + deepstack)


def block_mlp_bytes(vision: VisionShape, dtype_bytes: int) -> int:
    """Return the bytes per patch of one block's MLP without gradients."""
    return dtype_bytes * (vision.mlp_matrices * vision.intermediate + 2 * vision.hidden) + FP32_BYTES * vision.hidden


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
