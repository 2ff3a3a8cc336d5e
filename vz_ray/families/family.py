"""What a model family defines: config checks, shape, tables of the vision tower, names of layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vz_ray.families.shape import ModelShape, TextShape, VisionShape
from vz_ray.utils.errors import UserError

TEXT_PREFIX, VISION_PREFIX = "model.language_model.", "model.visual."
"""HF names of the language model and the vision tower in all families."""

Sizes = tuple[int, int]
"""Input and output size of a linear layer."""
Tables = dict[str, NDArray[Any] | int]
"""Index tables of a batch of images, by the keyword of the vision tower's forward."""


class ModelFamily(ABC):
    """A model family: everything that differs between architectures and does not follow from the shape.

    Images are single frames with their own timestamps, so that the rotary positions (M-RoPE) of all
    families agree; see `vz_ray.learner.batch.mrope_positions`.

    Attributes:
        name: Name for users.
        model_type: `model_type` of the checkpoint's config.json.
        frame_text: Recommended text of a frame, as in the family's training data; the fields are those of
            `PromptTemplate.frame`.
        chat_formats: Values of `episode.chat_format` that suit the family's weights.
        processor_max_pixels: Maximum image area of the released checkpoints' processor, in pixels.
        known_shapes: Public architectures, from the `config.json` of the released checkpoints.
    """

    name: ClassVar[str]
    model_type: ClassVar[str]
    frame_text: ClassVar[str]
    chat_formats: ClassVar[tuple[str, ...]] = ("clean",)
    processor_max_pixels: ClassVar[int]
    known_shapes: ClassVar[Mapping[str, ModelShape]]

    @abstractmethod
    def read_shape(self, config: Any) -> ModelShape:
        """Return the shape of a model from its HF config.

        Raises:
            UserError: The variant is not supported; see `check_config`.
        """

    @abstractmethod
    def image_tables(self, grids: NDArray[np.int64], vision: VisionShape) -> Tables:
        """Return the index tables of a batch of images.

        Args:
            grids: `[N, 3]` patch grids (1, rows, columns).
            vision: Shape of the vision tower.
        """

    @abstractmethod
    def vision_linear_layers(self, vision: VisionShape) -> Iterator[tuple[str, Sizes]]:
        """Yield name and sizes of each linear layer of the tower, names relative to `VISION_PREFIX`.

        The patch projection is excluded: it is no linear layer in the learner.
        """

    def text_linear_layers(self, text: TextShape) -> Iterator[tuple[str, Sizes]]:
        """Yield name and sizes of each linear layer of the language model, relative to `TEXT_PREFIX`."""
        for layer in range(text.layers):
            name = f"layers.{layer}."
            yield from self.attention_linear_layers(text, layer, name)
            # The experts of a layer are two tensors, and the router is one: none is a linear layer.
            if text.experts is None or layer not in text.experts.indices:
                yield from gated_mlp_layers(name, text.hidden, text.intermediate)

    def attention_linear_layers(self, text: TextShape, layer: int, name: str) -> Iterator[tuple[str, Sizes]]:
        """Yield name and sizes of each linear layer of one layer's attention."""
        gate = text.query_dim if text.output_gate else 0
        yield f"{name}self_attn.q_proj", (text.hidden, text.query_dim + gate)
        yield f"{name}self_attn.k_proj", (text.hidden, text.kv_dim)
        yield f"{name}self_attn.v_proj", (text.hidden, text.kv_dim)
        yield f"{name}self_attn.o_proj", (text.query_dim, text.hidden)

    def linear_layers(self, shape: ModelShape) -> Iterator[tuple[str, Sizes]]:
        """Yield HF name and sizes of each linear layer that may have an adapter, without `lm_head`."""
        for name, sizes in self.vision_linear_layers(shape.vision):
            yield VISION_PREFIX + name, sizes
        for name, sizes in self.text_linear_layers(shape.text):
            yield TEXT_PREFIX + name, sizes

    def is_stored_transposed(self, parameter: str) -> bool:
        """Return whether checkpoints and engines hold a parameter with its last two dimensions exchanged."""
        return False

    def check_config(self, config: Any) -> None:
        """Check the parts of an HF config that no family supports.

        Raises:
            UserError: The weights are quantized, or a layer type is unknown.
        """
        if getattr(config, "quantization_config", None):
            raise self.unsupported("quantization_config", "set", "unquantized weights")

    def check_layer_types(self, config: Any, supported: tuple[str, ...]) -> None:
        """Check the attention of the text layers.

        Raises:
            UserError: A layer has another type.
        """
        unknown_types = set(getattr(config.get_text_config(), "layer_types", None) or ()) - set(supported)
        if unknown_types:
            raise self.unsupported(
                "text_config.layer_types",
                ", ".join(sorted(unknown_types)),
                f"{' and '.join(supported)}. If it was trained with full attention, set use_sliding_window to false",
            )

    def unsupported(self, field: str, value: object, supported: str) -> UserError:
        """Return an error that names family, field, value and what is supported."""
        return UserError(f"{self.name}: {field} in config.json is {value}; supported: {supported}")


def read_text(config: Any, **features: Any) -> TextShape:
    """Return the shape of the language model of an HF config.

    Args:
        config: Config of the whole model.
        features: Fields of `TextShape` that the family sets.
    """
    text = config.get_text_config()
    return TextShape(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        intermediate=text.intermediate_size,
        vocab_size=text.vocab_size,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        **features,
    )


def read_tower(config: Any, **features: Any) -> VisionShape:
    """Return the shape of the vision tower of an HF config; `features` are further fields of `VisionShape`."""
    vision = config.vision_config
    return VisionShape(
        depth=vision.depth,
        hidden=vision.hidden_size,
        heads=vision.num_heads,
        intermediate=vision.intermediate_size,
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        out_hidden=vision.out_hidden_size,
        channels=vision.in_channels,
        **features,
    )


def gated_mlp_layers(name: str, hidden: int, intermediate: int) -> Iterator[tuple[str, Sizes]]:
    """Yield name and sizes of the three matrices of a gated MLP."""
    yield f"{name}mlp.gate_proj", (hidden, intermediate)
    yield f"{name}mlp.up_proj", (hidden, intermediate)
    yield f"{name}mlp.down_proj", (intermediate, hidden)
