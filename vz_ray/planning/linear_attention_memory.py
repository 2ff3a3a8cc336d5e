"""Bytes that a gated-delta-net layer saves for its backward pass; see `vz_ray.learner.linear_attention`.

Per token: the input projections, the convolution, the gated delta rule over chunks of tokens, the gated norm.
The layer's own norms and MLP are those of every decoder layer.
"""

from __future__ import annotations

from vz_ray.families import LinearAttentionShape
from vz_ray.planning.model_flops import DELTA_RULE_CHUNK

FP32_BYTES = 4


def saved_bytes(linear: LinearAttentionShape, dtype_bytes: int, *, kernel: bool, padding: float = 1.0) -> int:
    """Return the saved bytes per token of one layer, without norms and MLP.

    Args:
        linear: Shape of the layer.
        dtype_bytes: Size of a number.
        kernel: Whether the kernel of flash-linear-attention computes the delta rule: an estimate.
        padding: Tokens per token in the chunks of the portable delta rule.
    """
    convolution = 2 * dtype_bytes * linear.conv_dim
    # The logarithm of the decay before and after softplus, in float32, and beta.
    gates = (2 * FP32_BYTES + dtype_bytes) * linear.value_heads
    # Input, gate and its activation in float32; normalized and scaled values, and the output.
    norm = (3 * FP32_BYTES + 3 * dtype_bytes) * linear.value_dim + FP32_BYTES * linear.value_heads
    rule = _kernel_bytes(linear, dtype_bytes) if kernel else _portable_bytes(linear, dtype_bytes, padding)
    return convolution + gates + norm + rule


def _kernel_bytes(linear: LinearAttentionShape, dtype_bytes: int) -> int:
    """Return the bytes of flash-linear-attention's kernel, whose backward pass computes states and new values again.

    Normalized queries and keys, which are repeated for every value head, with their norms; values; the inverse of
    each chunk's triangular system; decay and beta.
    """
    vectors = 2 * linear.key_head_dim + linear.value_head_dim + DELTA_RULE_CHUNK
    return linear.value_heads * (dtype_bytes * (vectors + 1) + 3 * FP32_BYTES)


def _portable_bytes(linear: LinearAttentionShape, dtype_bytes: int, padding: float) -> int:
    """Return the bytes of the portable form, in float32: before the chunks, and in chunks.

    In chunks, per key head: keys three times, queries twice, keys for the queries, and two products of vectors of a
    chunk. Per value head: four matrices of a chunk, right and left side of the triangular system, new values,
    decayed queries and keys, three numbers, and the chunk's state.
    """
    keys, values, chunk = linear.key_head_dim, linear.value_head_dim, DELTA_RULE_CHUNK
    # In float32 the queries, keys and values are a view of the convolution's output.
    copies = linear.conv_dim if dtype_bytes == FP32_BYTES else 4 * linear.key_dim
    inputs = copies + 2 * linear.key_heads
    per_key_head = 6 * keys + 2 * chunk
    per_value_head = 4 * chunk + 2 * (keys + values) + values + 2 * keys + 3 + keys * values // chunk
    chunks = linear.key_heads * per_key_head + linear.value_heads * per_value_head
    return FP32_BYTES * (inputs + round(padding * chunks))
