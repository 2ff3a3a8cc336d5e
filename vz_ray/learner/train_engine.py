"""DeepSpeed around a policy: sharding, gradient accumulation, clipping, the optimizer step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from vz_ray.config.learner import LearnerConfig
from vz_ray.learner.distributed import RankInfo
from vz_ray.learner.lr_schedule import learning_rate


def training_dtype(config: LearnerConfig, place: RankInfo) -> torch.dtype:
    """What the weights are kept and multiplied in."""
    if config.dtype == "auto":
        return torch.bfloat16 if place.device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def deepspeed_config(config: LearnerConfig, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's own configuration.

    Accumulation is unmanaged: the number of micro-steps differs from one
    optimizer step to the next, and only the caller knows which is the last.
    """
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": config.param_persistence_threshold,
    }
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if _is_plain(config, dtype) else config.optimizer.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Without the check, a gradient that is no number would go into bfloat16 weights at stages 1 and 2.
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
    }


def _deepspeed() -> Any:
    """DeepSpeed, told not to compile its shared-memory collectives: gloo does, and needs no compiler."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def prepare_frozen(module: nn.Module, config: LearnerConfig, place: RankInfo) -> Any:
    """A module that is only evaluated; sharded like the trained one where that is (ZeRO-3)."""
    module.requires_grad_(False).eval()
    dtype = training_dtype(config, place)
    if config.zero_stage < 3:
        return module.to(place.device)
    settings = deepspeed_config(config, dtype)
    settings["zero_optimization"].pop("offload_optimizer", None)
    return _deepspeed().initialize(model=module.to(place.device), config=settings, dist_init_required=False)[
        0
    ]


def _is_plain(config: LearnerConfig, dtype: torch.dtype) -> bool:
    """Whether DeepSpeed leaves the torch optimizer unwrapped, so that norm and clipping are ours to do."""
    return config.zero_stage == 0 and dtype == torch.float32


class ClippedAdamW(torch.optim.AdamW):
    """AdamW on whole gradients: clips them, and leaves out a step whose norm is not finite.

    Attributes:
        norm: Of the last gradient, before clipping.
        overflow: Whether the last step was left out; DeepSpeed's wrapped optimizers have the same.
    """

    def __init__(self, trained: list[nn.Parameter], max_norm: float, **settings: Any) -> None:
        super().__init__(trained, **settings)
        self._trained, self._max_norm = trained, max_norm or float("inf")
        self.norm, self.overflow = 0.0, False

    def step(self, closure: Any = None) -> Any:
        self.norm = float(nn.utils.clip_grad_norm_(self._trained, self._max_norm))
        self.overflow = not math.isfinite(self.norm)
        return None if self.overflow else super().step(closure)


class TrainEngine:
    """A module under DeepSpeed. Gradients of all `backward` calls since the last `step` add up.

    Args:
        module: On the CPU, in its training dtype.

    Attributes:
        steps: Updates done; the schedule's clock.
        consecutive_skips: Updates skipped since the last one that was done.
    """

    def __init__(self, module: nn.Module, config: LearnerConfig, place: RankInfo) -> None:
        deepspeed = _deepspeed()
        self._config, self._place = config.optimizer, place
        self.dtype = training_dtype(config, place)
        if self.dtype == torch.bfloat16 and config.zero_stage == 0:
            raise ValueError(
                "learner.zero_stage 0 keeps no float32 copy of bfloat16 weights, "
                "so that small steps are lost; use 1, 2 or 3"
            )
        optimizer = _optimizer([p for p in module.parameters() if p.requires_grad], config, self.dtype)
        settings = deepspeed_config(config, self.dtype)
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=module.to(place.device), optimizer=optimizer, config=settings, dist_init_required=False
        )
        # DeepSpeed 0.19.8 keeps a skipped update's gradients there, and the next would add to them.
        self._sums_stay = config.offload == "optimizer" and config.zero_stage < 3
        self.steps = self.consecutive_skips = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.deepspeed(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds this rank's share of the gradient; shares of all ranks are summed.

        A loss that is no finite number makes the whole gradient NaN, whatever its derivative would be:
        the norm, which all ranks share, then tells every one of them, without asking.
        """
        # Of constants: the gradient would get the NaN of a branch of `where` that is not taken all the same.
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, float("nan"))
        # DeepSpeed averages over ranks; losses here are already normalised over the whole batch.
        self.deepspeed.backward(loss * self._place.world_size, scale_wrt_gas=False)

    def step(self) -> dict[str, float]:
        """Clips, updates, clears gradients; returns the norm before clipping, the rate, and `consecutive_skips`.

        Where the norm over all ranks is not finite, the update is skipped on every rank: weights,
        optimizer state and `steps` stay as they are, gradients are cleared, and `consecutive_skips` is 1. DeepSpeed
        computes that norm before it touches a weight: at stages 1 to 3 it then does the same by itself
        (at 1 and 2 in bfloat16, if it is told to check), at stage 0 it leaves all of it to the optimizer.
        """
        rate = learning_rate(self._config, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.deepspeed.step()
        self.deepspeed.zero_grad()
        done = self.deepspeed.was_step_applied()
        if not done and self._sums_stay:
            sums = self.optimizer.averaged_gradients
            sums.update(dict.fromkeys(sums))
        self.steps, self.consecutive_skips = (
            (self.steps + 1, 0) if done else (self.steps, self.consecutive_skips + 1)
        )
        plain = isinstance(self.optimizer, ClippedAdamW)
        norm = self.optimizer.norm if plain else self.deepspeed.get_global_grad_norm()
        return {"learning_rate": rate, "grad_norm": float(norm), "consecutive_skips": float(not done)}


def _optimizer(
    trained: list[nn.Parameter], config: LearnerConfig, dtype: torch.dtype
) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {
        "lr": config.optimizer.learning_rate,
        "betas": (config.optimizer.beta1, config.optimizer.beta2),
        "eps": config.optimizer.epsilon,
        "weight_decay": config.optimizer.weight_decay,
    }
    if _is_plain(config, dtype):
        return ClippedAdamW(trained, config.optimizer.max_grad_norm, **settings)
    return torch.optim.AdamW(trained, **settings)
