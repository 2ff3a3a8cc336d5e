"""Shape of a Qwen2.5-VL model, from which memory and FLOPs follow."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vz_ray.utils.errors import UserError

MODEL_TYPE = "qwen2_5_vl"
DEFAULT_MAX_PIXELS = 12_845_056
"""Maximum image area of the released checkpoints' processor, in pixels."""


@dataclass(frozen=True, slots=True)
class TextShape:
    """Shape of the language model, in elements."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab_size: int
    tie_word_embeddings: bool
    """Whether `lm_head` shares the embedding."""

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden // self.heads

    @property
    def kv_dim(self) -> int:
        """Size of a token's keys in one layer; the values have the same size."""
        return self.kv_heads * self.head_dim

    @property
    def layer_weights(self) -> int:
        """Elements of a layer's matrices; a token takes one multiply-add per element."""
        return 2 * self.hidden * (self.hidden + self.kv_dim) + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        biases_and_norms = (self.hidden + 2 * self.kv_dim) + 2 * self.hidden
        embeddings = self.vocab_size * self.hidden * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.layers * (self.layer_weights + biases_and_norms) + self.hidden


@dataclass(frozen=True, slots=True)
class VisionShape:
    """Shape of the vision tower and its merger, in elements; sides in pixels or patches."""

    depth: int
    hidden: int
    heads: int
    intermediate: int
    patch_size: int
    """Side of a patch in pixels."""
    temporal_patch_size: int
    """Frames per patch; an image is repeated to fill it."""
    merge_size: int
    """Patches per side of one visual token."""
    out_hidden: int
    window_size: int
    """Side of an attention window in pixels."""
    full_attention_blocks: tuple[int, ...]
    """Indices of blocks that attend to the whole image; others attend to windows."""
    channels: int = 3

    @property
    def patch_elements(self) -> int:
        """Elements of a patch in the processor's output."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def block_weights(self) -> int:
        """Elements of a block's matrices; a patch takes one multiply-add per element."""
        return 4 * self.hidden**2 + 3 * self.hidden * self.intermediate

    @property
    def merger_hidden(self) -> int:
        """Size of the concatenated patches of one visual token."""
        return self.hidden * self.merge_size**2

    @property
    def merger_weights(self) -> int:
        """Elements of the merger's matrices; a visual token takes one multiply-add per element."""
        return self.merger_hidden * (self.merger_hidden + self.out_hidden)

    @property
    def merger_parameters(self) -> int:
        """Parameters of the merger: matrices, biases and a norm."""
        return self.merger_weights + self.merger_hidden + self.out_hidden + self.hidden

    @property
    def parameters(self) -> int:
        # Biases of qkv, the projection and the three MLP matrices; two norms.
        biases_and_norms = 4 * self.hidden + 2 * self.intermediate + self.hidden + 2 * self.hidden
        patch_projection = self.patch_elements * self.hidden
        blocks = self.depth * (self.block_weights + biases_and_norms)
        return patch_projection + blocks + self.merger_parameters


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Shape of a Qwen2.5-VL model.

    Example: `ModelShape.from_hf_config(AutoConfig.from_pretrained(directory)).parameters`
    """

    text: TextShape
    vision: VisionShape

    @property
    def parameters(self) -> int:
        """Total number of parameters; a tied `lm_head` counts once."""
        return self.text.parameters + self.vision.parameters

    @classmethod
    def from_hf_config(cls, config: Any) -> ModelShape:
        """Create the shape from a HF `Qwen2_5_VLConfig`.

        Raises:
            UserError: The model belongs to another family.
        """
        if config.model_type != MODEL_TYPE:
            raise UserError(f"model type is {config.model_type}; the planner supports {MODEL_TYPE} only")
        text, vision = config.get_text_config(), config.vision_config
        return cls(
            TextShape(
                hidden=text.hidden_size,
                layers=text.num_hidden_layers,
                heads=text.num_attention_heads,
                kv_heads=text.num_key_value_heads,
                intermediate=text.intermediate_size,
                vocab_size=text.vocab_size,
                tie_word_embeddings=bool(config.tie_word_embeddings),
            ),
            VisionShape(
                depth=vision.depth,
                hidden=vision.hidden_size,
                heads=vision.num_heads,
                intermediate=vision.intermediate_size,
                patch_size=vision.patch_size,
                temporal_patch_size=vision.temporal_patch_size,
                merge_size=vision.spatial_merge_size,
                out_hidden=vision.out_hidden_size,
                window_size=vision.window_size,
                full_attention_blocks=tuple(vision.fullatt_block_indexes),
                channels=vision.in_channels,
            ),
        )


def _tower(out_hidden: int) -> VisionShape:
    """Return the tower of the released checkpoints, which differ in `out_hidden` only."""
    return VisionShape(32, 1280, 16, 3420, 14, 2, 2, out_hidden, 112, (7, 15, 23, 31))


KNOWN_SHAPES = {
    "Qwen2.5-VL-3B": ModelShape(TextShape(2048, 36, 16, 2, 11_008, 151_936, True), _tower(2048)),
    "Qwen2.5-VL-7B": ModelShape(TextShape(3584, 28, 28, 4, 18_944, 152_064, False), _tower(3584)),
}
"""Public architectures, from the `config.json` of the released checkpoints."""


def load_model_shape(model: str) -> ModelShape:
    """Load the shape of a checkpoint directory (weights not required) or a known name like Qwen2.5-VL-7B.

    Raises:
        UserError: `model` is neither a directory with a config.json nor a known name, or the model belongs
            to another family.
    """
    path = Path(model)
    if model and (path / "config.json").is_file():
        from transformers import AutoConfig

        return ModelShape.from_hf_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
    for name, shape in KNOWN_SHAPES.items():
        if re.fullmatch(rf"{re.escape(name)}(-Instruct)?", path.name, flags=re.IGNORECASE):
            return shape
    problem = f"model is {model!r}, which has no config.json" if model else "model is not set"
    raise UserError(
        f"{problem}; set it to a checkpoint directory or a known name: model={' or model='.join(KNOWN_SHAPES)}"
    )


def processor_max_pixels(model: str) -> int:
    """Return the maximum image area of the checkpoint's processor, in pixels."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = Path(model) / name
        if not model or not path.is_file():
            continue
        settings = json.loads(path.read_text())
        settings = settings.get("image_processor", settings)
        max_pixels = (settings.get("size") or {}).get("longest_edge") or settings.get("max_pixels")
        if max_pixels:
            return int(max_pixels)
    return DEFAULT_MAX_PIXELS
