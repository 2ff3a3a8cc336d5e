"""Which weights a learner trains: all, those outside the vision tower, or low-rank adapters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vz_ray.config.learner import LearnerConfig, LoraConfig
from vz_ray.planning.model_shape import ModelShape

_TEXT, _VISION = "model.language_model.", "model.visual."


@dataclass(frozen=True, slots=True)
class TrainableParams:
    """Counts of elements.

    Attributes:
        text: Trained, of the language model, `lm_head` counted in.
        vision: Trained, of the vision tower and its merger.
        frozen: Without gradients.
        largest_tensor: Of the largest tensor that is trained.
        dropout_inputs: Inputs a token of the language model's adapters, all layers together, of which dropout makes
            a copy and a mask of a byte each; 0 without dropout.
    """

    text: int
    vision: int
    frozen: int
    largest_tensor: int
    dropout_inputs: int = 0

    @property
    def trainable(self) -> int:
        """All that have gradients."""
        return self.text + self.vision

    @property
    def total(self) -> int:
        """All weights, adapters counted in."""
        return self.trainable + self.frozen


def count_trainable_params(shape: ModelShape, learner: LearnerConfig) -> TrainableParams:
    """What this learner trains of such a model.

    Raises:
        UserError: No linear layer matches one of learner.lora.target_modules.
    """
    if learner.lora.rank:
        return _adapters(shape, learner.lora)
    embedding = shape.text.vocab_size * shape.text.hidden
    if learner.freeze_vision:
        return TrainableParams(shape.text.parameters, 0, shape.vision.parameters, embedding)
    return TrainableParams(shape.text.parameters, shape.vision.parameters, 0, embedding)


def _adapters(shape: ModelShape, lora: LoraConfig) -> TrainableParams:
    """Of A `[rank, in]` and B `[out, rank]` of each layer that matches, and the merger if asked for."""
    linear = dict(adaptable_layers(shape))
    adapted = {name: linear[name] for name in lora.match_layers(list(linear))}
    counts = dict.fromkeys((_TEXT, _VISION), 0)
    for name, sides in adapted.items():
        counts[_TEXT if name.startswith(_TEXT) else _VISION] += lora.rank * sum(sides)
    merger = shape.vision.merger_parameters if lora.train_merger else 0
    tensors = [lora.rank * max(sides) for sides in adapted.values()]
    if lora.train_merger:
        tensors.append(shape.vision.merger_hidden**2)
    inputs = sum(sides[0] for name, sides in adapted.items() if name.startswith(_TEXT))
    return TrainableParams(
        text=counts[_TEXT],
        vision=counts[_VISION] + merger,
        frozen=shape.parameters - merger,
        largest_tensor=max(tensors),
        dropout_inputs=inputs if lora.dropout else 0,
    )


def adaptable_layers(shape: ModelShape) -> Iterator[tuple[str, tuple[int, int]]]:
    """HF name, and elements of inputs and outputs, of each linear layer that may have an adapter.

    The patches' projection and `lm_head` are none in the learner.
    """
    text, vision = shape.text, shape.vision
    for block in range(vision.depth):
        name = f"{_VISION}blocks.{block}."
        yield f"{name}attn.qkv", (vision.hidden, 3 * vision.hidden)
        yield f"{name}attn.proj", (vision.hidden, vision.hidden)
        yield from _mlp(name, vision.hidden, vision.intermediate)
    yield f"{_VISION}merger.mlp.0", (vision.merger_hidden, vision.merger_hidden)
    yield f"{_VISION}merger.mlp.2", (vision.merger_hidden, vision.out_hidden)
    for layer in range(text.layers):
        name = f"{_TEXT}layers.{layer}."
        yield f"{name}self_attn.q_proj", (text.hidden, text.hidden)
        yield f"{name}self_attn.k_proj", (text.hidden, text.kv_dim)
        yield f"{name}self_attn.v_proj", (text.hidden, text.kv_dim)
        yield f"{name}self_attn.o_proj", (text.hidden, text.hidden)
        yield from _mlp(name, text.hidden, text.intermediate)


def _mlp(name: str, hidden: int, intermediate: int) -> Iterator[tuple[str, tuple[int, int]]]:
    yield f"{name}mlp.gate_proj", (hidden, intermediate)
    yield f"{name}mlp.up_proj", (hidden, intermediate)
    yield f"{name}mlp.down_proj", (intermediate, hidden)
