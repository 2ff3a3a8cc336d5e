"""Qwen3-VL, dense: learned positions and deepstack in the vision tower, normalized queries and keys."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vz_ray.families.family import ModelFamily, Sizes, Tables, read_text, read_tower
from vz_ray.families.image_tables import interpolation_tables, position_tables
from vz_ray.families.shape import ModelShape, TextShape, VisionShape

SMALL_TOWER = VisionShape(
    depth=24, hidden=1024, heads=16, intermediate=4096, patch_size=16, temporal_patch_size=2, merge_size=2,
    out_hidden=0, position_table=2304,
)  # fmt: skip
LARGE_TOWER = VisionShape(
    depth=27, hidden=1152, heads=16, intermediate=4304, patch_size=16, temporal_patch_size=2, merge_size=2,
    out_hidden=0, position_table=2304,
)  # fmt: skip
"""Towers of the released checkpoints, also of Qwen3.5; they differ further in the output size and deepstack."""
_MODEL_TYPE = "qwen3_vl"


def _dense(hidden: int, layers: int, heads: int, intermediate: int, *, tied: bool, tower: VisionShape) -> ModelShape:
    """Return a released checkpoint's shape."""
    text = TextShape(hidden, layers, heads, 8, 128, intermediate, 151_936, tied, qk_norm=True)
    blocks = (5, 11, 17) if tower is SMALL_TOWER else (8, 16, 24)
    return ModelShape(_MODEL_TYPE, text, replace(tower, out_hidden=hidden, deepstack_blocks=blocks))


class Qwen3VL(ModelFamily):
    name = "Qwen3-VL"
    model_type = _MODEL_TYPE
    frame_text = "<{time:.1f} seconds>{image}"
    processor_max_pixels = 16_777_216
    known_shapes: ClassVar[Mapping[str, ModelShape]] = {
        "Qwen3-VL-2B": _dense(2048, 28, 16, 6144, tied=True, tower=SMALL_TOWER),
        "Qwen3-VL-4B": _dense(2560, 36, 32, 9728, tied=True, tower=SMALL_TOWER),
        "Qwen3-VL-8B": _dense(4096, 36, 32, 12_288, tied=False, tower=LARGE_TOWER),
        "Qwen3-VL-32B": _dense(5120, 64, 64, 25_600, tied=False, tower=LARGE_TOWER),
    }

    def check_config(self, config: Any) -> None:
        super().check_config(config)
        self.check_layer_types(config, ("full_attention",))
        text, vision = config.get_text_config(), config.vision_config
        blocks = list(getattr(vision, "deepstack_visual_indexes", ()))
        if len(blocks) > text.num_hidden_layers or any(not 0 <= block < vision.depth for block in blocks):
            raise self.unsupported(
                "vision_config.deepstack_visual_indexes",
                blocks,
                f"at most {text.num_hidden_layers} blocks (one per text layer), each from 0 to {vision.depth - 1}",
            )
        if math.isqrt(vision.num_position_embeddings) ** 2 != vision.num_position_embeddings:
            raise self.unsupported(
                "vision_config.num_position_embeddings", vision.num_position_embeddings, "square numbers"
            )

    def read_shape(self, config: Any) -> ModelShape:
        return ModelShape(self.model_type, self.read_text_shape(config), self.read_tower_shape(config))

    def read_text_shape(self, config: Any) -> TextShape:
        """Return the shape of the language model."""
        return read_text(config, qkv_bias=config.get_text_config().attention_bias, qk_norm=True)

    def read_tower_shape(self, config: Any) -> VisionShape:
        """Return the shape of the vision tower, with deepstack if its config has any."""
        vision = config.vision_config
        blocks = tuple(getattr(vision, "deepstack_visual_indexes", ()))
        return read_tower(config, position_table=vision.num_position_embeddings, deepstack_blocks=blocks)

    def image_tables(self, grids: NDArray[np.int64], vision: VisionShape) -> Tables:
        side = math.isqrt(vision.position_table)
        return position_tables(grids, vision.merge_size) | interpolation_tables(grids, vision.merge_size, side)

    def vision_linear_layers(self, vision: VisionShape) -> Iterator[tuple[str, Sizes]]:
        for block in range(vision.depth):
            yield f"blocks.{block}.attn.qkv", (vision.hidden, 3 * vision.hidden)
            yield f"blocks.{block}.attn.proj", (vision.hidden, vision.hidden)
            yield f"blocks.{block}.mlp.linear_fc1", (vision.hidden, vision.intermediate)
            yield f"blocks.{block}.mlp.linear_fc2", (vision.intermediate, vision.hidden)
        mergers = ["merger", *(f"deepstack_merger_list.{level}" for level in range(len(vision.deepstack_blocks)))]
        for merger in mergers:
            yield f"{merger}.linear_fc1", (vision.merger_hidden, vision.merger_hidden)
            yield f"{merger}.linear_fc2", (vision.merger_hidden, vision.out_hidden)
