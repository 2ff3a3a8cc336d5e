"""Parameter counts by role: full training, frozen vision tower, or LoRA adapters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vz_ray.config.learner import LearnerConfig, LoraConfig
from vz_ray.planning.model_shape import ModelShape

_TEXT_PREFIX, _VISION_PREFIX = "model.language_model.", "model.visual."


@dataclass(frozen=True, slots=True)
class TrainableParams:
    """Numbers of parameters.

    Attributes:
        text: Trainable parameters of the language model, including `lm_head`.
        vision: Trainable parameters of the vision tower and its merger.
        frozen: Parameters without gradients.
        largest_tensor: Elements of the largest trainable tensor.
        dropout_inputs: Adapter inputs per token over all text layers; dropout saves a copy and a one-byte
            mask of each. 0 without dropout.
    """

    text: int
    vision: int
    frozen: int
    largest_tensor: int
    dropout_inputs: int = 0

    @property
    def trainable(self) -> int:
        """Parameters with gradients."""
        return self.text + self.vision

    @property
    def total(self) -> int:
        """All parameters, including adapters."""
        return self.trainable + self.frozen


def count_trainable_params(shape: ModelShape, learner: LearnerConfig) -> TrainableParams:
    """Count the parameters that a learner trains.

    Raises:
        UserError: A pattern of `learner.lora.target_modules` matches no linear layer.
    """
    if learner.lora.rank:
        return _count_adapter_params(shape, learner.lora)
    embedding = shape.text.vocab_size * shape.text.hidden
    if learner.freeze_vision:
        return TrainableParams(shape.text.parameters, 0, shape.vision.parameters, embedding)
    return TrainableParams(shape.text.parameters, shape.vision.parameters, 0, embedding)


def _count_adapter_params(shape: ModelShape, lora: LoraConfig) -> TrainableParams:
    """Count A `[rank, in]` and B `[out, rank]` of each matching layer, and the merger if it is trained."""
    linear = dict(adaptable_layers(shape))
    adapted = {name: linear[name] for name in lora.match_layers(list(linear))}
    counts = dict.fromkeys((_TEXT_PREFIX, _VISION_PREFIX), 0)
    for name, sizes in adapted.items():
        counts[_TEXT_PREFIX if name.startswith(_TEXT_PREFIX) else _VISION_PREFIX] += lora.rank * sum(sizes)
    merger = shape.vision.merger_parameters if lora.train_merger else 0
    tensors = [lora.rank * max(sizes) for sizes in adapted.values()]
    if lora.train_merger:
        tensors.append(shape.vision.merger_hidden**2)
    inputs = sum(sizes[0] for name, sizes in adapted.items() if name.startswith(_TEXT_PREFIX))
    return TrainableParams(
        text=counts[_TEXT_PREFIX],
        vision=counts[_VISION_PREFIX] + merger,
        frozen=shape.parameters - merger,
        largest_tensor=max(tensors),
        dropout_inputs=inputs if lora.dropout else 0,
    )


def adaptable_layers(shape: ModelShape) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the HF name and the input and output sizes of each linear layer that may have an adapter.

    The patch projection and `lm_head` are excluded: they are not linear layers in the learner.
    """
    text, vision = shape.text, shape.vision
    for block in range(vision.depth):
        name = f"{_VISION_PREFIX}blocks.{block}."
        yield f"{name}attn.qkv", (vision.hidden, 3 * vision.hidden)
        yield f"{name}attn.proj", (vision.hidden, vision.hidden)
        yield from _mlp_layers(name, vision.hidden, vision.intermediate)
    yield f"{_VISION_PREFIX}merger.mlp.0", (vision.merger_hidden, vision.merger_hidden)
    yield f"{_VISION_PREFIX}merger.mlp.2", (vision.merger_hidden, vision.out_hidden)
    for layer in range(text.layers):
        name = f"{_TEXT_PREFIX}layers.{layer}."
        yield f"{name}self_attn.q_proj", (text.hidden, text.hidden)
        yield f"{name}self_attn.k_proj", (text.hidden, text.kv_dim)
        yield f"{name}self_attn.v_proj", (text.hidden, text.kv_dim)
        yield f"{name}self_attn.o_proj", (text.hidden, text.hidden)
        yield from _mlp_layers(name, text.hidden, text.intermediate)


def _mlp_layers(name: str, hidden: int, intermediate: int) -> Iterator[tuple[str, tuple[int, int]]]:
    yield f"{name}mlp.gate_proj", (hidden, intermediate)
    yield f"{name}mlp.up_proj", (hidden, intermediate)
    yield f"{name}mlp.down_proj", (intermediate, hidden)
