"""DeepSpeed engine of the policy: sharding, gradient accumulation, clipping, optimizer step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from vz_ray.config.learner import LearnerConfig, OptimizerConfig
from vz_ray.learner.distributed import RankInfo
from vz_ray.learner.tiled_mlp import tiled_modules

REDUCE_BUCKET_ELEMENTS = 500_000_000
"""Gradient elements that are reduced at a time, DeepSpeed's default. A buffer of this size is allocated as a whole."""


def training_dtype(config: LearnerConfig, rank_info: RankInfo) -> torch.dtype:
    """Return the dtype of the model: `learner.dtype`, or for `auto` bfloat16 on GPUs and float32 on CPUs."""
    if config.dtype == "auto":
        return torch.bfloat16 if rank_info.device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def deepspeed_config(config: LearnerConfig, rank_info: RankInfo) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    Gradient accumulation is unmanaged: the number of micro-batches varies between optimizer steps.
    """
    dtype, on_gpu = training_dtype(config, rank_info), rank_info.device.type == "cuda"
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        # With unmanaged accumulation, DeepSpeed refuses it below stage 2. Gloo has no streams to overlap.
        "overlap_comm": on_gpu and rank_info.world_size > 1 and config.zero_stage >= 2,
        "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS,
        "stage3_param_persistence_threshold": config.param_persistence_threshold,
    }
    host = {"device": "cpu", "pin_memory": on_gpu}
    if config.offload != "none":
        zero["offload_optimizer"] = host
    if config.offload == "all":
        zero["offload_param"] = dict(host)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if _uses_torch_optimizer(config, dtype) else config.optimizer.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Without the check, stages 1 and 2 apply non-finite gradients to bfloat16 weights.
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
    }


def _deepspeed() -> Any:
    """Import DeepSpeed without its compiled shared-memory collectives; gloo needs no compiler."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def prepare_frozen(module: nn.Module, config: LearnerConfig, rank_info: RankInfo) -> Any:
    """Prepare a module for evaluation only; under ZeRO-3 it is sharded like the trained module."""
    module.requires_grad_(False).eval()
    if config.zero_stage < 3:
        return module.to(rank_info.device)
    settings = deepspeed_config(config, rank_info)
    settings["zero_optimization"].pop("offload_optimizer", None)
    _gather_tiled_modules_whole(module)
    engine, *_ = _deepspeed().initialize(model=module.to(rank_info.device), config=settings, dist_init_required=False)
    return engine


def _gather_tiled_modules_whole(module: nn.Module) -> None:
    """Let ZeRO-3 gather an MLP that is computed in tiles once per pass, whatever the number of tiles on a rank."""
    from deepspeed.utils import set_z3_leaf_module

    for mlp in tiled_modules(module):
        set_z3_leaf_module(mlp, True)


def _uses_torch_optimizer(config: LearnerConfig, dtype: torch.dtype) -> bool:
    """Return whether DeepSpeed uses the torch optimizer unwrapped; norm and clipping are then done here."""
    return config.zero_stage == 0 and dtype == torch.float32


class ClippedAdamW(torch.optim.AdamW):
    """AdamW with gradient clipping that skips steps with a non-finite gradient norm.

    Attributes:
        norm: Norm of the last gradient before clipping.
        overflow: Whether the last step was skipped; DeepSpeed's wrapped optimizers have the same attribute.
    """

    def __init__(self, parameters: list[nn.Parameter], max_norm: float, **settings: Any) -> None:
        super().__init__(parameters, **settings)
        self._parameters, self._max_norm = parameters, max_norm or float("inf")
        self.norm, self.overflow = 0.0, False

    def step(self, closure: Any = None) -> Any:
        self.norm = float(nn.utils.clip_grad_norm_(self._parameters, self._max_norm))
        self.overflow = not math.isfinite(self.norm)
        return None if self.overflow else super().step(closure)


class TrainEngine:
    """DeepSpeed engine. Gradients of all `backward` calls since the last `step` accumulate.

    Args:
        module: The model on the CPU, in its training dtype.

    Attributes:
        steps: Applied updates; input of the learning-rate schedule.
        consecutive_skips: Skipped updates since the last applied one.
    """

    def __init__(self, module: nn.Module, config: LearnerConfig, rank_info: RankInfo) -> None:
        deepspeed = _deepspeed()
        self._config, self._rank_info = config.optimizer, rank_info
        self.dtype = training_dtype(config, rank_info)
        if self.dtype == torch.bfloat16 and config.zero_stage == 0:
            raise ValueError(
                "learner.zero_stage is 0 with bfloat16 weights; stage 0 has no float32 copy of the weights "
                "and loses small updates. Use 1, 2 or 3."
            )
        optimizer = _create_optimizer([p for p in module.parameters() if p.requires_grad], config, self.dtype)
        settings = deepspeed_config(config, rank_info)
        _gather_tiled_modules_whole(module)
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=module.to(rank_info.device), optimizer=optimizer, config=settings, dist_init_required=False
        )
        # DeepSpeed 0.19.8 keeps the gradients of a skipped update in this mode; `step` clears them.
        self._keeps_skipped_gradients = config.offload == "optimizer" and config.zero_stage < 3
        self._shards_parameters = config.zero_stage == 3
        self.steps = self.consecutive_skips = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.deepspeed(*args, **kwargs)
        if self._shards_parameters and not torch.is_grad_enabled():
            self._release_gathered()
        return output

    def _release_gathered(self) -> None:
        """Partition all parameters after a forward-only pass; every rank must call.

        DeepSpeed does not know that no backward pass follows: it keeps parameters and prefetches others for it. It
        can neither gather nor partition a parameter in flight, so that a following export would fail.
        """
        self.deepspeed.optimizer.checkpoint_event_prologue()
        self.deepspeed.optimizer.checkpoint_event_epilogue()

    def backward(self, loss: torch.Tensor) -> None:
        """Add this rank's gradient; the gradients of all ranks are summed.

        A non-finite loss makes the whole gradient NaN, so that the global norm reports it to every rank
        without extra communication.
        """
        # Constants in both branches: `where` would pass the NaN of an untaken branch to the gradient.
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, float("nan"))
        # DeepSpeed averages over ranks, but losses are already normalized over the whole batch.
        self.deepspeed.backward(loss * self._rank_info.world_size, scale_wrt_gas=False)

    def step(self) -> dict[str, float]:
        """Clip the gradients, update the weights, clear the gradients.

        If the global norm is not finite, every rank skips the update: weights, optimizer state and `steps`
        do not change. At stages 1 to 3 DeepSpeed skips the update itself (at 1 and 2 in bfloat16 only with
        `check_grad_overflow`); at stage 0 `ClippedAdamW` does.

        Returns:
            `learning_rate`, `grad_norm` before clipping, and `skipped` (0 or 1).
        """
        rate = learning_rate(self._config, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.deepspeed.step()
        self.deepspeed.zero_grad()
        applied = self.deepspeed.was_step_applied()
        if not applied and self._keeps_skipped_gradients:
            gradients = self.optimizer.averaged_gradients
            gradients.update(dict.fromkeys(gradients))
        if applied:
            self.steps, self.consecutive_skips = self.steps + 1, 0
        else:
            self.consecutive_skips += 1
        is_torch = isinstance(self.optimizer, ClippedAdamW)
        norm = self.optimizer.norm if is_torch else self.deepspeed.get_global_grad_norm()
        return {"learning_rate": rate, "grad_norm": float(norm), "skipped": float(not applied)}


def _create_optimizer(
    parameters: list[nn.Parameter], config: LearnerConfig, dtype: torch.dtype
) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {
        "lr": config.optimizer.learning_rate,
        "betas": (config.optimizer.beta1, config.optimizer.beta2),
        "eps": config.optimizer.epsilon,
        "weight_decay": config.optimizer.weight_decay,
        # One kernel per parameter, also for states in host memory: no temporary copies.
        "fused": True,
    }
    if _uses_torch_optimizer(config, dtype):
        return ClippedAdamW(parameters, config.optimizer.max_grad_norm, **settings)
    return torch.optim.AdamW(parameters, **settings)


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    Linear warm-up over `warmup_ratio * total_steps` steps, then constant, or half a cosine that reaches 0
    after `total_steps`.

    Example: peak 1.0, cosine, warm-up 0.1 of 100 steps: 0.1 at step 0, 1.0 at
    step 10, 0.5 at step 55, 0.0 from step 100 on.
    """
    warm = int(config.warmup_ratio * config.total_steps)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    if config.lr_schedule == "constant":
        return config.learning_rate
    done = min((step - warm) / max(config.total_steps - warm, 1), 1.0)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
