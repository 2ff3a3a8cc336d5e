"""DeepSpeed around a policy: sharding, gradient accumulation, clipping, the optimizer step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vz_ray.config.learner import LearnerConfig
from vz_ray.learner.distributed import Place
from vz_ray.learner.schedule import learning_rate


def training_dtype(config: LearnerConfig, place: Place) -> torch.dtype:
    """What the weights are kept and multiplied in."""
    if config.dtype == "auto":
        return torch.bfloat16 if place.device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def zero_config(config: LearnerConfig, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's own configuration.

    Accumulation is unmanaged: the number of micro-steps differs from one
    optimizer step to the next, and only the caller knows which is the last.
    """
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": config.zero_keep_whole,
    }
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if _is_plain(config, dtype) else config.optimizer.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
    }


def _deepspeed() -> Any:
    """DeepSpeed, told not to compile its shared-memory collectives: gloo does, and needs no compiler."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def freeze(module: nn.Module, config: LearnerConfig, place: Place) -> Any:
    """A module that is only evaluated; sharded like the trained one where that is (ZeRO-3)."""
    module.requires_grad_(False).eval()
    dtype = training_dtype(config, place)
    if config.zero_stage < 3:
        return module.to(place.device)
    settings = zero_config(config, dtype)
    settings["zero_optimization"].pop("offload_optimizer", None)
    return _deepspeed().initialize(model=module.to(place.device), config=settings, dist_init_required=False)[
        0
    ]


def _is_plain(config: LearnerConfig, dtype: torch.dtype) -> bool:
    """Whether DeepSpeed leaves the torch optimizer unwrapped, so that norm and clipping are ours to do."""
    return config.zero_stage == 0 and dtype == torch.float32


class Engine:
    """A module under DeepSpeed. Gradients of all `backward` calls since the last `step` add up.

    Args:
        module: On the CPU, in its training dtype.
    """

    def __init__(self, module: nn.Module, config: LearnerConfig, place: Place) -> None:
        deepspeed = _deepspeed()
        self._config, self._place = config.optimizer, place
        self.dtype = training_dtype(config, place)
        if self.dtype == torch.bfloat16 and config.zero_stage == 0:
            raise ValueError(
                "learner.zero_stage 0 keeps no float32 copy of bfloat16 weights, "
                "so that small steps are lost; use 1, 2 or 3"
            )
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained,
            lr=config.optimizer.learning_rate,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            eps=config.optimizer.epsilon,
            weight_decay=config.optimizer.weight_decay,
        )
        settings = zero_config(config, self.dtype)
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=module.to(place.device), optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.steps = 0
        self._norm = 0.0
        if _is_plain(config, self.dtype):
            optimizer.register_step_pre_hook(lambda *_: self._clip(trained))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.deepspeed(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds this rank's share of the gradient; shares of all ranks are summed."""
        # DeepSpeed averages over ranks; losses here are already normalised over the whole batch.
        self.deepspeed.backward(loss * self._place.world, scale_wrt_gas=False)

    def step(self) -> dict[str, float]:
        """Clips, updates, clears gradients; returns the norm before clipping and the rate used."""
        rate = learning_rate(self._config, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.deepspeed.step()
        self.deepspeed.zero_grad()
        self.steps += 1
        norm = self.deepspeed.get_global_grad_norm()
        return {"learning_rate": rate, "grad_norm": self._norm if norm is None else float(norm)}

    def _clip(self, trained: list[nn.Parameter]) -> None:
        limit = self._config.max_grad_norm or float("inf")
        self._norm = float(nn.utils.clip_grad_norm_(trained, limit))
