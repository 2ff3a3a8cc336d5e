"""Linear-attention layers in a packed sequence.

The gated-delta-net layers of Qwen3.5 are recurrent: a causal convolution over 4 tokens, then the gated delta rule.
In a packed sequence each segment starts from zero, or from where its prefix ends: the prefix's last 3 inputs of the
convolution and its last recurrent state.
"""

from __future__ import annotations

from functools import lru_cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vz_ray.learner.attention import PackedLayout, Segment, accumulation_dtype
from vz_ray.learner.gated_delta_rule import gated_delta_rule
from vz_ray.learner.sequence_parallel import SequenceShard, gather_tokens, own_heads, scatter_tokens

LINEAR_ATTENTION = "linear_attention"
"""Type of these layers in `layer_types` of transformers' configurations."""


def pack_linear_attention(text: Any) -> None:
    """Replace the forward function of the linear-attention layers of an HF text model; weights keep their names.

    The text model then takes `layout`, and needs an attention mask that is a dictionary with `linear_attention`.
    """
    for layer, kind in zip(text.layers, text.config.layer_types, strict=True):
        if kind == LINEAR_ATTENTION:
            layer.linear_attn.forward = MethodType(packed_linear_attention, layer.linear_attn)
            layer.linear_attn.conv1d.forward = MethodType(_convolve_channels, layer.linear_attn.conv1d)


def packed_linear_attention(module: Any, hidden_states: Tensor, *, layout: PackedLayout, **unused: Any) -> Tensor:
    """Compute a gated-delta-net layer of transformers for one packed sequence.

    All weights of submodules are used through their forward functions, which gathers them under ZeRO-3.

    Args:
        module: A `Qwen3_5GatedDeltaNet`.
        hidden_states: `[1, T, hidden size]`; this rank's tokens with `layout.shard`.
        layout: Segments of the sequence.

    Returns:
        `[1, T, hidden size]`.
    """
    hidden, shard = hidden_states[0], layout.shard
    mixed, channels = _gather_channels(module, module.in_proj_qkv(hidden), shard)
    query, key, value = _split_heads(module, _convolve(module, mixed, layout.segments, channels))
    step, beta = module.in_proj_a(hidden), module.in_proj_b(hidden)
    if shard is not None:
        step, beta = (gather_tokens(t[..., None], shard)[..., 0] for t in (step, beta))
    dtype, heads = accumulation_dtype(step.dtype), own_heads(module.num_v_heads, shard)
    # In half precision the decay of a slow head would round to 1.
    decay = -module.A_log[heads].to(dtype).exp() * F.softplus(step.to(dtype) + module.dt_bias[heads])
    out = gated_delta_rule(query, key, value, decay, beta.sigmoid(), layout.segments)
    if shard is not None:
        out = scatter_tokens(out, shard)
    gate = module.in_proj_z(hidden).view(-1, module.head_v_dim)
    out = module.norm(out.reshape(-1, module.head_v_dim), gate)
    result: Tensor = module.out_proj(out.view(1, len(hidden), module.value_dim))
    return result


def _split_heads(module: Any, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split `[T, channels]` into queries, keys and values, `[T, heads, d]` each."""
    dims = (module.key_dim, module.key_dim, module.value_dim)
    widths = (module.head_k_dim, module.head_k_dim, module.head_v_dim)
    parts = mixed.split([dim * mixed.shape[-1] // sum(dims) for dim in dims], -1)
    query, key, value = (part.unflatten(-1, (-1, width)) for part, width in zip(parts, widths, strict=True))
    return query, key, value


def _gather_channels(module: Any, mixed: Tensor, shard: SequenceShard | None) -> tuple[Tensor, Tensor | None]:
    """Return the channels of this rank's heads for all tokens, and their indices; all channels without a shard."""
    if shard is None:
        return mixed, None
    gathered = torch.cat([gather_tokens(part, shard).flatten(1) for part in _split_heads(module, mixed)], -1)
    index = torch.arange(mixed.shape[-1], device=mixed.device)[None]
    own = [part[0, own_heads(part.shape[1], shard)].flatten() for part in _split_heads(module, index)]
    return gathered, torch.cat(own)


def _convolve_channels(conv: Any, stream: Tensor, channels: Tensor | None = None) -> Tensor:
    """Forward function of a depthwise `Conv1d` for some of its channels, `[1, channels, length]`."""
    weight, bias = conv.weight, conv.bias
    if channels is not None:
        weight, bias = weight[channels], None if bias is None else bias[channels]
    return F.conv1d(stream, weight, bias, conv.stride, conv.padding, conv.dilation, groups=len(weight))


def _convolve(module: Any, inputs: Tensor, segments: tuple[Segment, ...], channels: Tensor | None = None) -> Tensor:
    """Apply the causal convolution and its activation to `[T, channels]`."""
    from transformers.activations import ACT2FN

    rows, outputs = _convolution_index(segments, module.conv_kernel_size - 1, inputs.device)
    stream = F.pad(inputs, (0, 0, 0, 1)).index_select(0, rows)
    # The module pads the stream with zeros on both sides: output i sees the inputs up to i.
    arguments = () if channels is None else (channels,)
    convolved = module.conv1d(stream.T[None], *arguments)[0].T.index_select(0, outputs)
    return ACT2FN[module.activation](convolved)


@lru_cache(maxsize=8)
def _convolution_index(segments: tuple[Segment, ...], history: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the rows of the convolution's input, and the positions of the tokens' outputs.

    Before each segment stand the last `history` rows of its prefix; missing rows are row T, which is zero.
    """
    length = segments[-1].end
    rows: list[int] = []
    outputs: list[int] = []
    for segment in segments:
        before = list(range(*segment.prefix))[-history:]
        rows += [length] * (history - len(before)) + before
        outputs += range(len(rows), len(rows) + segment.end - segment.start)
        rows += range(segment.start, segment.end)
    return torch.tensor(rows, device=device), torch.tensor(outputs, device=device)
