"""Qwen3.5, dense: the vision tower of Qwen3-VL without deepstack, and mostly layers with linear attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from vz_ray.families.family import Sizes, read_text
from vz_ray.families.qwen3_vl import LARGE_TOWER, SMALL_TOWER, Qwen3VL
from vz_ray.families.shape import LinearAttentionShape, ModelShape, TextShape, VisionShape

_LINEAR, _FULL = "linear_attention", "full_attention"
FULL_ATTENTION_INTERVAL = 4
"""In the released checkpoints every fourth layer has full attention."""
_MODEL_TYPE = "qwen3_5"


def _dense(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, value_heads: int, *, tower: VisionShape
) -> ModelShape:
    """Return a released checkpoint's shape; embeddings are tied in those with the small tower."""
    indices = tuple(layer for layer in range(layers) if (layer + 1) % FULL_ATTENTION_INTERVAL)
    text = TextShape(
        hidden, layers, heads, kv_heads, 256, intermediate, 248_320, tower is SMALL_TOWER,
        qk_norm=True, output_gate=True, float32_norms=True, rotary_share=0.25,
        linear=LinearAttentionShape(indices, 16, value_heads, 128, 128, 4),
    )  # fmt: skip
    return ModelShape(_MODEL_TYPE, text, replace(tower, out_hidden=hidden))


class Qwen35(Qwen3VL):
    name = "Qwen3.5"
    model_type = _MODEL_TYPE
    known_shapes: ClassVar[Mapping[str, ModelShape]] = {
        "Qwen3.5-2B": _dense(2048, 24, 8, 2, 6144, 16, tower=SMALL_TOWER),
        "Qwen3.5-4B": _dense(2560, 32, 16, 4, 9216, 32, tower=SMALL_TOWER),
        "Qwen3.5-9B": _dense(4096, 32, 16, 4, 12_288, 32, tower=LARGE_TOWER),
        "Qwen3.5-27B": _dense(5120, 64, 24, 4, 17_408, 48, tower=LARGE_TOWER),
    }

    def check_config(self, config: Any) -> None:
        super().check_config(config)
        if config.get_text_config().attention_bias:
            raise self.unsupported("text_config.attention_bias", "true", "false")

    def check_layer_types(self, config: Any, supported: tuple[str, ...]) -> None:
        super().check_layer_types(config, (_LINEAR, _FULL))

    def read_text_shape(self, config: Any) -> TextShape:
        text = config.get_text_config()
        linear = LinearAttentionShape(
            indices=tuple(index for index, kind in enumerate(text.layer_types) if kind == _LINEAR),
            key_heads=text.linear_num_key_heads,
            value_heads=text.linear_num_value_heads,
            key_head_dim=text.linear_key_head_dim,
            value_head_dim=text.linear_value_head_dim,
            conv_kernel=text.linear_conv_kernel_dim,
        )
        return read_text(
            config,
            qk_norm=True,
            output_gate=True,
            float32_norms=True,
            rotary_share=text.rope_parameters["partial_rotary_factor"],
            linear=linear,
        )

    def attention_linear_layers(self, text: TextShape, layer: int, name: str) -> Iterator[tuple[str, Sizes]]:
        linear = text.linear
        if linear is None or layer not in linear.indices:
            yield from super().attention_linear_layers(text, layer, name)
            return
        yield f"{name}linear_attn.in_proj_qkv", (text.hidden, linear.conv_dim)
        yield f"{name}linear_attn.in_proj_z", (text.hidden, linear.value_dim)
        yield f"{name}linear_attn.in_proj_b", (text.hidden, linear.value_heads)
        yield f"{name}linear_attn.in_proj_a", (text.hidden, linear.value_heads)
        yield f"{name}linear_attn.out_proj", (linear.value_dim, text.hidden)
