"""Parameter counts by role: full training, frozen vision tower, or LoRA adapters."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.learner import LearnerConfig, LoraConfig
from vz_ray.families import FAMILIES, TEXT_PREFIX, VISION_PREFIX, ModelShape


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
    text = shape.text
    largest = text.vocab_size * text.hidden
    if text.experts:  # gate and up projections of all experts of a layer are one tensor
        largest = max(largest, text.experts.weights(text.hidden) * 2 // 3)
    if learner.freeze_vision:
        return TrainableParams(text.parameters, 0, shape.vision.parameters, largest)
    return TrainableParams(text.parameters, shape.vision.parameters, 0, largest)


def _count_adapter_params(shape: ModelShape, lora: LoraConfig) -> TrainableParams:
    """Count A `[rank, in]` and B `[out, rank]` of each matching layer, and the merger if it is trained."""
    linear = dict(FAMILIES[shape.model_type].linear_layers(shape))
    adapted = {name: linear[name] for name in lora.match_layers(list(linear))}
    counts = dict.fromkeys((TEXT_PREFIX, VISION_PREFIX), 0)
    for name, sizes in adapted.items():
        counts[TEXT_PREFIX if name.startswith(TEXT_PREFIX) else VISION_PREFIX] += lora.rank * sum(sizes)
    merger = shape.vision.merger_parameters if lora.train_merger else 0
    tensors = [lora.rank * max(sizes) for sizes in adapted.values()]
    if lora.train_merger:
        tensors.append(shape.vision.merger_hidden**2)
    inputs = sum(sizes[0] for name, sizes in adapted.items() if name.startswith(TEXT_PREFIX))
    return TrainableParams(
        text=counts[TEXT_PREFIX],
        vision=counts[VISION_PREFIX] + merger,
        frozen=shape.parameters - merger,
        largest_tensor=max(tensors),
        dropout_inputs=inputs if lora.dropout else 0,
    )
