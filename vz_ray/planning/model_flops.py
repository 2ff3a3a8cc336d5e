"""FLOPs of a forward pass; a multiply-add counts as two.

Only matrix products and attention are counted; norms, activations and rotary embeddings are below one
percent. The backward pass takes twice the forward FLOPs for trained matrices and once for frozen matrices
that gradients pass through. Gradient checkpointing adds one more forward pass.
"""

from __future__ import annotations

from vz_ray.families import ModelShape, TextShape, VisionShape

BACKWARD_FACTOR = 2
"""FLOPs of a backward pass relative to the forward pass: gradients of inputs and weights."""
DELTA_RULE_CHUNK = 64
"""Tokens that the gated delta rule computes at a time."""
FROZEN_BACKWARD_FACTOR = 1
"""The same for frozen matrices: gradients of the inputs only."""


def text_flops(shape: ModelShape, tokens: int, pairs: int) -> int:
    """Return the FLOPs of the decoder layers, without `lm_head`.

    Args:
        shape: Shape of the model.
        tokens: Number of tokens.
        pairs: Query-key pairs in one layer of full attention. See `causal_pairs` and `packed_pairs`.
    """
    text = shape.text
    attention = 4 * pairs * text.attention_layers * text.query_dim
    return 2 * tokens * text.matrix_weights + attention + tokens * _delta_rule_flops(text)


def _delta_rule_flops(text: TextShape) -> int:
    """Return the FLOPs per token of the gated delta rule in all layers, computed in chunks.

    Per head: products of queries and keys within a chunk, the triangular solve, the chunk's values, and three
    products with the recurrent state. The convolution is below one percent.
    """
    linear = text.linear
    if linear is None:
        return 0
    keys, values, chunk = linear.key_head_dim, linear.value_head_dim, DELTA_RULE_CHUNK
    within_chunk = 4 * chunk * keys + chunk * (keys + values) + 2 * chunk * values
    return linear.layers * linear.value_heads * (within_chunk + 6 * keys * values)


def head_flops(shape: ModelShape, tokens: int) -> int:
    """Return the FLOPs of `lm_head`, which runs only on tokens that need log-probs."""
    return 2 * tokens * shape.text.hidden * shape.text.vocab_size


def vision_flops(shape: ModelShape, patches: int, pairs: int) -> int:
    """Return the FLOPs of the vision tower and its merger.

    Args:
        shape: Shape of the model.
        patches: Number of patches.
        pairs: Query-key pairs summed over all blocks, since some blocks attend to windows. See
            `vision_pairs`.
    """
    vision = shape.vision
    blocks = 2 * patches * vision.depth * vision.block_weights + 4 * pairs * vision.hidden
    projection = 2 * patches * vision.patch_elements * vision.hidden
    return blocks + projection + 2 * (patches // vision.merge_size**2) * vision.merger_weights


def causal_pairs(tokens: int) -> int:
    """Return the query-key pairs of one causal sequence."""
    return tokens * (tokens + 1) // 2


def packed_pairs(prefix: int, branches: list[int]) -> int:
    """Return the query-key pairs of a shared prefix and its branches, which do not attend to each other."""
    return causal_pairs(prefix) + sum(branch * prefix + causal_pairs(branch) for branch in branches)


def vision_pairs(vision: VisionShape, rows: int, columns: int) -> int:
    """Return the query-key pairs of one image of `rows` x `columns` patches, summed over all blocks.

    Windows start at the upper left corner; windows at the other edges may be smaller.
    """
    if not vision.window_size:
        return vision.depth * (rows * columns) ** 2
    full = len(vision.full_attention_blocks)
    side = vision.window_size // vision.patch_size // vision.merge_size * vision.merge_size
    heights, widths = _window_sides(rows, side), _window_sides(columns, side)
    windowed = sum((height * width) ** 2 for height in heights for width in widths)
    return full * (rows * columns) ** 2 + (vision.depth - full) * windowed


def _window_sides(length: int, side: int) -> list[int]:
    return [min(side, length - start) for start in range(0, length, side)]
