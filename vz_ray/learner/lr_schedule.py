"""Learning-rate schedule."""

from __future__ import annotations

import math

from vz_ray.config.learner import OptimizerConfig


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
