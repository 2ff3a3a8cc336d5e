"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft, and what they make of the weights under them.

A layer of weight W computes W x + s B A x, of which A `[r, in]` and B `[out, r]` are trained, and
s = alpha / r. B starts at 0, so that training starts at the checkpoint itself.

What leaves the learner is merged: W + s B A, under the names and shapes of the checkpoint. An engine then
knows nothing of adapters: it runs at full speed with its quantities of memory known beforehand, every
verification of a publish (tensors by name, log-probs of the probe) holds as it is, and an exported
checkpoint loads anywhere. The price is that a publish moves all weights rather than the adapters alone.
The sum is taken in float32 and rounded once, to the type that the weights are kept in. In bfloat16 an engine
therefore samples from weights that are rounded where the learner's are not: `mismatch/kl` shows by how much.
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
"""peft's name of the one adapter."""
_BASE = ".base_layer."
_PARTS = (".lora_A.", ".lora_B.")


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """What an adapter adds to the weight `[out, in]` of its layer: `scale` B A.

    Attributes:
        a: `[r, in]`.
        b: `[out, r]`.
        scale: alpha / r.
    """

    a: nn.Parameter
    b: nn.Parameter
    scale: float

    def merge_into(self, weight: Tensor) -> Tensor:
        """W + scale B A, a new tensor of W's type; the sum is taken in float32. All must be whole."""
        delta = self.b.detach().float() @ self.a.detach().float()
        return torch.add(weight.detach().float(), delta, alpha=self.scale).to(weight.dtype)


class GradOnlyDropout(nn.Module):
    """Dropout of an update's forward pass alone.

    Log-probs that are only read (old and reference ones, a publish's probe) are those of the policy that
    engines sample from; there gradients are off.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p, training=torch.is_grad_enabled())


def add_adapters(hf: Any, config: LoraConfig, base: str, seed: int) -> None:
    """Puts adapters into a HF model, and leaves nothing trainable but them (and the merger, if asked).

    Other names of parameters: `x.weight` of an adapted layer becomes `x.base_layer.weight`, beside
    `x.lora_A.default.weight` and `x.lora_B.default.weight`. Every rank draws the same A from `seed`.

    Args:
        hf: The HF model of a `PolicyModel`; changed in place.
        base: The checkpoint directory that it is, which the adapter's own configuration names.

    Raises:
        UserError: No linear layer matches a target.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    linear = [name for name, module in hf.named_modules() if isinstance(module, nn.Linear)]
    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=config.match_layers(linear),
        base_model_name_or_path=base,
    )
    dtype = next(hf.parameters()).dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, hf, ADAPTER_NAME)
    for layer in _adapted(hf).values():
        layer.lora_A.to(dtype)
        layer.lora_B.to(dtype)
        if config.dropout:
            layer.lora_dropout[ADAPTER_NAME] = GradOnlyDropout(config.dropout)
    if config.train_merger:
        hf.model.visual.merger.requires_grad_(True)


def _adapted(hf: nn.Module) -> dict[str, Any]:
    """Layers with an adapter, by name."""
    return {
        name: module for name, module in hf.named_modules() if ADAPTER_NAME in getattr(module, "lora_A", ())
    }


def has_adapters(hf: nn.Module) -> bool:
    """Whether `adapt` was called."""
    return bool(_adapted(hf))


def base_parameter_name(name: str) -> str | None:
    """What a parameter is called in the checkpoint; None for an adapter's own.

    Example: `model.visual.merger.mlp.0.base_layer.weight` -> `model.visual.merger.mlp.0.weight`
    """
    return None if any(part in name for part in _PARTS) else name.replace(_BASE, ".")


def lora_deltas(hf: nn.Module) -> dict[str, LoraDelta]:
    """What is added to which weight, by the weight's plain name."""
    return {
        f"{name}.weight": LoraDelta(
            layer.lora_A[ADAPTER_NAME].weight,
            layer.lora_B[ADAPTER_NAME].weight,
            float(layer.scaling[ADAPTER_NAME]),
        )
        for name, layer in _adapted(hf).items()
    }


@contextmanager
def adapters_disabled(hf: nn.Module) -> Iterator[None]:
    """The model is its checkpoint while the block runs; for passes without gradients."""
    layers = list(_adapted(hf).values())
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def peft_parameters(hf: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, under the names that peft gives it in `adapter_model.safetensors`."""
    return {
        f"base_model.model.{name.replace(f'.{ADAPTER_NAME}.', '.')}": parameter
        for name, parameter in hf.named_parameters()
        if parameter.requires_grad
    }


def peft_config(hf: Any) -> Any:
    """The adapter's configuration, as peft writes and reads it."""
    settings = hf.peft_config[ADAPTER_NAME]
    settings.inference_mode = True
    merger = any(parameter.requires_grad for parameter in hf.model.visual.merger.parameters())
    settings.modules_to_save = ["merger"] if merger else None
    return settings
