"""The numbers of a Qwen2.5-VL that memory and arithmetic follow from."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vz_ray.utils.errors import UserError

MODEL_TYPE = "qwen2_5_vl"
DEFAULT_MAX_PIXELS = 12_845_056
"""Largest area of an image for the released checkpoints' processor, pixels."""


@dataclass(frozen=True, slots=True)
class TextShape:
    """The language model: sizes in elements."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab_size: int
    tie_word_embeddings: bool
    """Whether `lm_head` is the embedding."""

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        return self.hidden // self.heads

    @property
    def kv_dim(self) -> int:
        """Elements of one token's keys in one layer; as many are its values."""
        return self.kv_heads * self.head_dim

    @property
    def layer_weights(self) -> int:
        """Elements of a layer's matrices: each is multiplied with every token."""
        return 2 * self.hidden * (self.hidden + self.kv_dim) + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        small = (self.hidden + 2 * self.kv_dim) + 2 * self.hidden  # biases of q, k and v; two norms
        tables = self.vocab_size * self.hidden * (1 if self.tie_word_embeddings else 2)
        return tables + self.layers * (self.layer_weights + small) + self.hidden


@dataclass(frozen=True, slots=True)
class VisionShape:
    """The vision tower and its merger: sizes in elements, sides in pixels or patches."""

    depth: int
    hidden: int
    heads: int
    intermediate: int
    patch_size: int
    """Side of a patch, pixels."""
    temporal_patch_size: int
    """Frames in a patch; an image is repeated to fill it."""
    merge_size: int
    """Patches per side that make one visual token."""
    out_hidden: int
    window_size: int
    """Side of an attention window, pixels."""
    full_attention_blocks: tuple[int, ...]
    """Blocks that attend to the whole image; others to windows."""
    channels: int = 3

    @property
    def patch_elements(self) -> int:
        """Numbers in a patch as it comes from the processor."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def block_weights(self) -> int:
        """Elements of a block's matrices."""
        return 4 * self.hidden**2 + 3 * self.hidden * self.intermediate

    @property
    def merger_hidden(self) -> int:
        """Elements of the patches that make one visual token."""
        return self.hidden * self.merge_size**2

    @property
    def merger_weights(self) -> int:
        """Elements of the merger's matrices: each is multiplied with every visual token."""
        return self.merger_hidden * (self.merger_hidden + self.out_hidden)

    @property
    def merger_parameters(self) -> int:
        """Elements of the merger: its matrices, their biases and a norm."""
        return self.merger_weights + self.merger_hidden + self.out_hidden + self.hidden

    @property
    def parameters(self) -> int:
        # Biases of qkv, of the projection and of the three matrices of the MLP; two norms.
        small = 4 * self.hidden + 2 * self.intermediate + self.hidden + 2 * self.hidden
        patches = self.patch_elements * self.hidden
        return patches + self.depth * (self.block_weights + small) + self.merger_parameters


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Qwen2.5-VL.

    Example: `ModelShape.from_hf_config(AutoConfig.from_pretrained(directory)).parameters`
    """

    text: TextShape
    vision: VisionShape

    @property
    def parameters(self) -> int:
        """Elements of all weights, a tied `lm_head` once."""
        return self.text.parameters + self.vision.parameters

    @classmethod
    def from_hf_config(cls, config: Any) -> ModelShape:
        """Of a HF `Qwen2_5_VLConfig`.

        Raises:
            UserError: It is a model of another family.
        """
        if config.model_type != MODEL_TYPE:
            raise UserError(
                f"the model is a {config.model_type}; what it takes is known of {MODEL_TYPE} alone"
            )
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


def _tower(out: int) -> VisionShape:
    """That of all released sizes; only what comes out differs."""
    return VisionShape(32, 1280, 16, 3420, 14, 2, 2, out, 112, (7, 15, 23, 31))


KNOWN_SHAPES = {
    "Qwen2.5-VL-3B": ModelShape(TextShape(2048, 36, 16, 2, 11_008, 151_936, True), _tower(2048)),
    "Qwen2.5-VL-7B": ModelShape(TextShape(3584, 28, 28, 4, 18_944, 152_064, False), _tower(3584)),
}
"""Public architectures, from the `config.json` of the released checkpoints."""


def load_model_shape(model: str) -> ModelShape:
    """Of a checkpoint directory (its weights need not be there), or of a known name such as Qwen2.5-VL-7B.

    Raises:
        UserError: There is no such directory and the name is not known, or it is another family.
    """
    path = Path(model)
    if model and (path / "config.json").is_file():
        from transformers import AutoConfig

        return ModelShape.from_hf_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
    for name, shape in KNOWN_SHAPES.items():
        if re.fullmatch(rf"{re.escape(name)}(-Instruct)?", path.name, flags=re.IGNORECASE):
            return shape
    what = f"{model!r} has no config.json" if model else "it is not set"
    raise UserError(
        f"model: {what}; give a checkpoint directory, or the name of a known shape: "
        f"model={' or model='.join(KNOWN_SHAPES)}"
    )


def processor_max_pixels(model: str) -> int:
    """Largest area of an image that the checkpoint's own processor lets through, pixels."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = Path(model) / name
        if not model or not path.is_file():
            continue
        settings = json.loads(path.read_text())
        settings = settings.get("image_processor", settings)
        found = (settings.get("size") or {}).get("longest_edge") or settings.get("max_pixels")
        if found:
            return int(found)
    return DEFAULT_MAX_PIXELS
