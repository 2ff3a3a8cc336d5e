"""Control of the policy's entropy by the coefficient of the entropy bonus."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vz_ray.config.loss import LossConfig


@dataclass
class EntropyController:
    """Raises the coefficient while the entropy is below a target, and lowers it otherwise.

    After a step with entropy H per token:  c <- max(0, c + step sign(target - H)).  The bonus of the next step has the
    coefficient c if H < target, and 0 otherwise. Skywork-OR1 (arXiv 2505.22312); there H is the entropy of the step's
    own samples, here that of the step before.

    Attributes:
        coef: c, also while the bonus is 0.
        below_target: Whether the last entropy was below the target.

    Example: target 0.2, step 0.001, c 0.001: after H = 0.15 c is 0.002 and is used; after H = 0.3 it is 0.001 and the
    bonus is 0.
    """

    coef: float
    below_target: bool = True

    def update(self, entropy: float, config: LossConfig) -> None:
        """Adapt to the entropy of a step in nats per token; `config` has a target.

        Raises:
            ValueError: There is no target.
        """
        if config.entropy_target is None:
            raise ValueError("learner.loss.entropy_target is null")
        self.below_target = entropy < config.entropy_target
        step = config.entropy_step if self.below_target else -config.entropy_step
        self.coef = max(0.0, self.coef + step)

    def apply(self, config: LossConfig) -> LossConfig:
        """Return the config with the coefficient of the next step's bonus; unchanged without a target."""
        if config.entropy_target is None:
            return config
        return replace(config, entropy_coef=self.coef if self.below_target else 0.0)
