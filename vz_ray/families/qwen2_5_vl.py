"""Qwen2.5-VL: windowed vision tower with gated MLPs, biases in queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vz_ray.families.family import ModelFamily, Sizes, Tables, gated_mlp_layers, read_text, read_tower
from vz_ray.families.image_tables import position_tables, window_tables
from vz_ray.families.shape import ModelShape, TextShape, VisionShape

_MODEL_TYPE = "qwen2_5_vl"


def _known_shape(text: TextShape) -> ModelShape:
    """Return a released checkpoint's shape; their towers differ in the output size only."""
    tower = VisionShape(
        depth=32, hidden=1280, heads=16, intermediate=3420, patch_size=14, temporal_patch_size=2, merge_size=2,
        out_hidden=text.hidden, window_size=112, full_attention_blocks=(7, 15, 23, 31),
        gated_mlp=True, norm_bias=False, patch_bias=False,
    )  # fmt: skip
    return ModelShape(_MODEL_TYPE, text, tower)


class Qwen25VL(ModelFamily):
    name = "Qwen2.5-VL"
    model_type = _MODEL_TYPE
    frame_text = "<frame{number}_time{time:.2f}s>{image}"
    chat_formats = ("clean", "compat")
    processor_max_pixels = 12_845_056
    known_shapes: ClassVar[Mapping[str, ModelShape]] = {
        "Qwen2.5-VL-3B": _known_shape(TextShape(2048, 36, 16, 2, 128, 11_008, 151_936, True, qkv_bias=True)),
        "Qwen2.5-VL-7B": _known_shape(TextShape(3584, 28, 28, 4, 128, 18_944, 152_064, False, qkv_bias=True)),
    }

    def check_config(self, config: Any) -> None:
        super().check_config(config)
        self.check_layer_types(config, ("full_attention",))

    def read_shape(self, config: Any) -> ModelShape:
        vision = config.vision_config
        tower = read_tower(
            config,
            window_size=vision.window_size,
            full_attention_blocks=tuple(vision.fullatt_block_indexes),
            gated_mlp=True,
            norm_bias=False,
            patch_bias=False,
        )
        return ModelShape(self.model_type, read_text(config, qkv_bias=True), tower)

    def image_tables(self, grids: NDArray[np.int64], vision: VisionShape) -> Tables:
        window = vision.window_size // vision.token_side
        return position_tables(grids, vision.merge_size) | window_tables(grids, vision.merge_size, window)

    def vision_linear_layers(self, vision: VisionShape) -> Iterator[tuple[str, Sizes]]:
        for block in range(vision.depth):
            yield f"blocks.{block}.attn.qkv", (vision.hidden, 3 * vision.hidden)
            yield f"blocks.{block}.attn.proj", (vision.hidden, vision.hidden)
            yield from gated_mlp_layers(f"blocks.{block}.", vision.hidden, vision.intermediate)
        yield "merger.mlp.0", (vision.merger_hidden, vision.merger_hidden)
        yield "merger.mlp.2", (vision.merger_hidden, vision.out_hidden)
