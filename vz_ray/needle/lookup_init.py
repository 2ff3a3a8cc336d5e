"""Initialization of tiny models for fast learning of lookups: which frame shows an object, and at what time.

From random weights, lookups are not learned within thousands of steps. Here every attention head starts by
attending to similar tokens and copying them (mimetic initialization, arXiv 2305.09828). One head attends to the
second previous token, which gives a time label information about its frame.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INIT_STD = 0.07
"""About 1 / sqrt(hidden_size). The usual 0.02 suits widths in the thousands and trains slowly here."""

EMBEDDING_STD = 0.5
"""Large enough to keep token identities distinguishable after the layers' updates."""

FRAME_SCALE = 0.12
"""Factor of the last projection of the vision tower: frame embeddings start no larger than text embeddings."""

DEEPSTACK_SCALE = 0.02
"""Factor of the deepstack projections: they start as a small addition to the frame embeddings."""

MATCH_SCALE = 0.6
"""Scale of queries and keys per channel; similar tokens get an attention score of about 3."""

EARLIER_SCALE = 0.87
"""`MATCH_SCALE` of normalized queries and keys in the layer that attends to an earlier token: a score of 6."""

COPY_SCALE = 0.25
"""Scale of a head's output relative to the copied token."""

CONSTANT = 4.0
"""Value of the constant channel in standard deviations of the other channels."""


def initialize_embeddings(model: Any, norm_offset: float = 0.0) -> None:
    """Scale the token embeddings to `EMBEDDING_STD`; tied embeddings keep the scale of the logits.

    Args:
        model: HF model.
        norm_offset: Constant that the model's RMS norms add to their weights.
    """
    text = model.model.language_model
    text.embed_tokens.weight.mul_(EMBEDDING_STD / INIT_STD)
    if model.config.tie_word_embeddings:
        text.norm.weight.fill_(INIT_STD / EMBEDDING_STD - norm_offset)


def initialize_attention(attention: Any, query_weight: Tensor, match_scale: float, output_scale: float = 1.0) -> None:
    """Let every head attend to tokens similar to the current one, and copy them.

    Args:
        attention: HF attention layer.
        query_weight: View of the rows of its `q_proj` that compute queries, `[heads, head_dim, hidden]`.
        match_scale: Scale of queries and keys.
        output_scale: Factor of the output projection.
    """
    size, hidden = attention.k_proj.weight.shape
    kv_heads, group = size // attention.head_dim, attention.num_key_value_groups
    similarity, copy = (torch.linalg.qr(torch.randn(hidden, hidden))[0][:size] for _ in range(2))

    def per_head(matrix: Tensor) -> Tensor:
        return matrix.view(kv_heads, -1, hidden).repeat_interleave(group, dim=0)

    attention.k_proj.weight.copy_(match_scale * similarity)
    query_weight.copy_(match_scale * per_head(similarity))
    attention.v_proj.weight.copy_(copy)
    attention.o_proj.weight.copy_(output_scale * (COPY_SCALE / group * per_head(copy).flatten(0, 1).T))


def earlier_token_vectors(head_dim: int, rotary_dim: int, theta: float, distance: int) -> tuple[Tensor, Tensor]:
    """Return a query and a key `[head_dim]` whose score is highest if the key is `distance` positions before.

    Args:
        head_dim: Channels of a head.
        rotary_dim: Leading channels with rotary positions.
        theta: Base of the rotary frequencies.
        distance: Distance in positions.
    """
    half = rotary_dim // 2
    angles = distance * theta ** (-torch.arange(half) / half)
    # Only the fastest quarter of the rotations separates neighboring positions.
    strength = 6**0.5 * (torch.arange(half) < half // 4)
    unrotated = torch.zeros(head_dim - rotary_dim)
    query = torch.cat([strength * torch.cos(angles), -strength * torch.sin(angles), unrotated])
    return query, torch.cat([strength, torch.zeros(half), unrotated])


def reserve_constant_channel(model: Any, projection: Any, norm_offset: float) -> None:
    """Make the first channel of the residual stream a constant at every token.

    Attention without biases can then compute queries and keys that do not depend on the token.

    Args:
        model: HF model whose layers are initialized.
        projection: Projection from the vision tower to the frame embeddings.
        norm_offset: Constant that the model's RMS norms add to their weights.
    """
    text = model.model.language_model
    embedding_std = float(text.embed_tokens.weight.std())
    # The projection's input, a GELU of unit-variance features, has a root mean square of about 0.7.
    frame_std = 0.7 * float(projection.weight.std()) * projection.in_features**0.5
    text.embed_tokens.weight[:, 0] = CONSTANT * embedding_std
    projection.bias[0] = CONSTANT * frame_std
    projection.weight[0] = 0
    for layer in text.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[0] = 1 - norm_offset
        for name, linear in layer.named_modules():
            if isinstance(linear, torch.nn.Linear):
                is_output = name.endswith(("o_proj", "out_proj", "down_proj"))
                (linear.weight if is_output else linear.weight.T)[0] = 0
