"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft, and merged weights.

An adapted layer computes W x + s B A x. A `[r, in]` and B `[out, r]` are trained, and s = alpha / r. B starts
at 0, so that training starts at the checkpoint.

Engines receive A and s B (`weight_sources.AdapterSource`), or merged weights: W + s B A under the names and shapes
of the checkpoint. Exports are merged: they load in any HF-compatible library.

The sum is computed in float32 and rounded once to the dtype of the weights. In bfloat16 the engine's weights
are therefore rounded and the learner's are not; `mismatch/kl` measures the difference. Engines that receive
adapters have the learner's weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vz_ray.config.learner import LoraConfig

ADAPTER_NAME = "default"
"""peft's name of the adapter."""
_BASE = ".base_layer."
_PARTS = (".lora_A.", ".lora_B.")


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """Addition of an adapter to its layer's weight `[out, in]`: `scale` B A.

    Attributes:
        a: `[r, in]`.
        b: `[out, r]`.
        scale: alpha / r.
    """

    a: Any
    b: Any
    scale: float

    def merge_into(self, weight: Tensor) -> Tensor:
        """Return W + scale B A as a new tensor of W's dtype, computed in float32. All tensors must be whole."""
        delta = self.b.detach().float() @ self.a.detach().float()
        return torch.add(weight.detach().float(), delta, alpha=self.scale).to(weight.dtype)


class GradOnlyDropout(nn.Module):
    """Dropout that is active only in forward passes with gradients.

    Passes without gradients (old and reference log-probs, parity probes) compute the policy that the engines
    sample from, without dropout.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p, training=torch.is_grad_enabled())


def add_adapters(hf: Any, config: LoraConfig, base: str, seed: int) -> None:
    """Add adapters to an HF model and freeze all other parameters, except the merger with `train_merger`.

    `x.weight` of an adapted layer becomes `x.base_layer.weight`; `x.lora_A.default.weight` and
    `x.lora_B.default.weight` are new. Every rank initializes A from the same `seed`.

    Args:
        hf: The HF model of a `PolicyModel`; changed in place.
        base: Checkpoint directory of the model, recorded in the adapter's config.

    Raises:
        UserError: A target matches no linear layer.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    linear_layers = [name for name, module in hf.named_modules() if isinstance(module, nn.Linear)]
    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=config.match_layers(linear_layers),
        base_model_name_or_path=base,
    )
    dtype = next(hf.parameters()).dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, hf, ADAPTER_NAME)
    for layer in _adapted_layers(hf).values():
        layer.lora_A.to(dtype)
        layer.lora_B.to(dtype)
        if config.dropout:
            layer.lora_dropout[ADAPTER_NAME] = GradOnlyDropout(config.dropout)
    if config.train_merger:
        for merger in vision_mergers(hf).values():
            merger.requires_grad_(True)


def vision_mergers(hf: Any) -> dict[str, nn.Module]:
    """Return the merger of the vision tower, and those of deepstack, by their names in the tower."""
    visual = hf.model.visual
    deepstack = enumerate(getattr(visual, "deepstack_merger_list", ()))
    return {"merger": visual.merger} | {f"deepstack_merger_list.{level}": merger for level, merger in deepstack}


def _adapted_layers(hf: nn.Module) -> dict[str, Any]:
    """Return the layers with an adapter, by name."""
    return {name: module for name, module in hf.named_modules() if ADAPTER_NAME in getattr(module, "lora_A", ())}


def has_adapters(hf: nn.Module) -> bool:
    """Return whether the model has adapters."""
    return bool(_adapted_layers(hf))


def base_parameter_name(name: str) -> str | None:
    """Return the name of a parameter in the checkpoint, or None for a parameter of an adapter.

    Example: `model.visual.merger.mlp.0.base_layer.weight` -> `model.visual.merger.mlp.0.weight`
    """
    return None if any(part in name for part in _PARTS) else name.replace(_BASE, ".")


def lora_deltas(hf: nn.Module) -> dict[str, LoraDelta]:
    """Return the adapter of each adapted weight, by the weight's name in the checkpoint."""
    return {
        f"{name}.weight": LoraDelta(
            layer.lora_A[ADAPTER_NAME].weight,
            layer.lora_B[ADAPTER_NAME].weight,
            float(layer.scaling[ADAPTER_NAME]),
        )
        for name, layer in _adapted_layers(hf).items()
    }


@contextmanager
def adapters_disabled(hf: nn.Module) -> Iterator[None]:
    """Disable the adapters inside the block; for passes without gradients."""
    layers = list(_adapted_layers(hf).values())
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def peft_parameters(hf: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters under their names in peft's `adapter_model.safetensors`."""
    return {
        f"base_model.model.{name.replace(f'.{ADAPTER_NAME}.', '.')}": parameter
        for name, parameter in hf.named_parameters()
        if parameter.requires_grad
    }


def peft_config(hf: Any) -> Any:
    """Return the adapter's config in peft's format."""
    settings = hf.peft_config[ADAPTER_NAME]
    settings.inference_mode = True
    mergers = vision_mergers(hf)
    trained = any(parameter.requires_grad for parameter in mergers["merger"].parameters())
    settings.modules_to_save = list(mergers) if trained else None
    return settings
