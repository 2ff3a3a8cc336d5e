"""What a publish sends to the engines: all weights, or the adapters of `learner.lora.publish: adapters`."""

from __future__ import annotations

import re

from vz_ray.config.learner import LearnerConfig, LoraConfig, match_layers
from vz_ray.config.rollout import EngineConfig
from vz_ray.families import FAMILIES, TEXT_PREFIX, ModelShape
from vz_ray.planning.trainable_params import count_trainable_params
from vz_ray.utils.errors import UserError


def check_published_adapters(shape: ModelShape, lora: LoraConfig) -> None:
    """Check that engines can apply the adapters of every layer.

    Raises:
        UserError: The model has experts, or a target matches no layer, or layers outside the language model.
    """
    if not lora.publishes_adapters:
        return
    if shape.text.experts:
        raise UserError(
            f"the model ({shape.model_type}) has experts, with which published adapters are not verified; set "
            "learner.lora.publish=merged"
        )
    linear_layers = [name for name, _ in FAMILIES[shape.model_type].linear_layers(shape)]
    outside = [name for name in lora.match_layers(linear_layers) if not name.startswith(TEXT_PREFIX)]
    if outside:
        modules = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in outside)
        raise UserError(
            f"learner.lora.target_modules match {', '.join(modules)}; engines apply adapters of the language model "
            r"only. Start the targets with language_model\..*, or set learner.lora.publish=merged"
        )


def published_bytes(shape: ModelShape, learner: LearnerConfig) -> int:
    """Return the bytes of a publish in bfloat16."""
    adapters = count_trainable_params(shape, learner).trainable if learner.lora.publishes_adapters else 0
    return 2 * (adapters or shape.parameters)


def adapter_slot_elements(shape: ModelShape, engine: EngineConfig) -> int:
    """Return the elements that an engine allocates for its adapter; 0 if it receives all weights.

    vLLM wraps the layers of the language model by the last part of their name, for example `q_proj`.
    """
    if not engine.adapter_rank:
        return 0
    linear = dict(FAMILIES[shape.model_type].linear_layers(shape))
    suffixes = {name.rpartition(".")[2] for name in match_layers(engine.adapter_targets, list(linear))}
    return sum(
        engine.adapter_rank * sum(sizes)
        for name, sizes in linear.items()
        if name.startswith(TEXT_PREFIX) and name.rpartition(".")[2] in suffixes
    )
