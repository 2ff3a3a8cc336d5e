"""Config of the RL loss; the defaults are the paper's."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from vz_ray.config.fields import InvalidValueError, Section, choice, derived, number

_REJECTION_BANDS = {"none": (0.0, inf), "token": (0.5, 5.0), "sequence": (0.5, 2.0), "geometric": (0.999, 1.001)}
"""Default band of each `rejection`: IcePop's, and those of verl's presets."""


@dataclass
class LossConfig(Section):
    """Advantages, policy loss, KL and entropy terms, corrections between engine and learner."""

    importance_sampling_level: str = choice("token", "sequence")
    """`token`: one importance ratio per token (GRPO); `sequence`: the geometric mean of a trajectory's ratios
    (GSPO)."""
    aggregation: str = choice("sequence_mean", "token_mean", "fixed_length")
    """`sequence_mean`: mean over a trajectory's sampled tokens, then over trajectories (the paper);
    `token_mean`: mean over all tokens (DAPO); `fixed_length`: sum over tokens / `fixed_length`, mean over
    trajectories (Dr.GRPO)."""
    fixed_length: int = number(4096, above=0)
    """Divisor of `fixed_length`."""
    advantage_estimator: str = choice("grpo", "dr_grpo")
    """`grpo`: (r - mean) / (std + 1e-6) within the group; `dr_grpo`: r - mean."""
    min_reward_std: float = number(1e-4, minimum=0)
    """Minimum standard deviation of a group's rewards; other groups are dropped."""
    turn_credit: str = choice("none", "shaped", "returns")
    """Advantage of a turn, from the turn rewards (`reward.turns`). `none`: that of the trajectory; `shaped`: plus the
    turn's normalized reward (MT-GRPO); `returns`: the normalized discounted return (GTPO)."""
    turn_coef: float = number(1.0, above=0)
    """Coefficient of the turn rewards with `turn_credit: shaped`."""
    turn_discount: float = number(0.9, above=0, maximum=1)
    """Discount per turn with `turn_credit: returns`."""
    frame_tie_break: float = number(0.0, minimum=0)
    """Maximum reduction of the reward of a correct sample that zoomed into more frames than another correct sample with
    the same reward; 0 disables it."""
    mask_truncated: str = choice("none", "turn", "episode")
    """Sampled tokens without loss. `turn`: of turns that reached their token limit; `episode`: of truncated
    episodes."""
    policy_loss: str = choice("clip", "cispo")
    """`clip`: the clipped surrogate of PPO and GRPO; `cispo`: log-probs weighted by the clipped, constant ratio."""
    clip_ratio_low: float = number(0.2, above=0)
    """Clip range of the importance ratio below 1; 1 and more set no lower limit."""
    clip_ratio_high: float = number(0.27, above=0)
    """Clip range of the importance ratio above 1."""
    clip_ratio_c: float | None = number(None, above=1)
    """Dual clip of `policy_loss: clip`: maximum importance ratio in the loss of tokens with a negative advantage; null
    disables it."""
    kl_coef: float = number(0.001, minimum=0)
    """Coefficient of the KL to the reference model; 0 loads no reference model."""
    kl_placement: str = choice("loss", "advantage")
    """`loss`: a term of the loss; `advantage`: subtracted from the normalized advantage of each token."""
    kl_estimator: str = choice("k3", "k1", "k2", "abs")
    """Estimate of the KL per token, with d = log-prob - reference's: `k1` d, `k2` d^2 / 2, `k3` exp(-d) + d - 1,
    `abs` |d|."""
    kl_cap: float | None = number(None, above=0)
    """Maximum absolute KL estimate of a token, in nats; the gradient beyond is 0. Null disables the cap."""
    entropy_coef: float = number(0.001, minimum=0)
    """Coefficient of the entropy bonus; the initial one with an `entropy_target`."""
    entropy_target: float | None = number(None, above=0)
    """Minimum entropy per token in nats: the coefficient grows by `entropy_step` after a step below it, and shrinks
    after others, whose bonus is 0; null keeps the coefficient."""
    entropy_step: float = number(0.001, above=0)
    """Change of the coefficient per step with an `entropy_target`."""
    tis_cap: float | None = number(None, above=0)
    """Cap C of the truncated importance weight min(exp(old - engine), C); null disables the weight."""
    tis_level: str = choice("token", "sequence")
    """Log-ratio of the truncated importance weight: of the token, or summed over the trajectory."""
    rejection: str = choice("none", "token", "sequence", "geometric")
    """Tokens without loss, because the ratio exp(old - engine) is outside `[rejection_low, rejection_high]`. `token`:
    the token's ratio (IcePop); for all tokens of a trajectory, `sequence`: the product of its ratios; `geometric`:
    their geometric mean."""
    rejection_low: float | None = number(None, minimum=0, below=1)
    """Minimum ratio; null follows `rejection`: 0.5, geometric 0.999."""
    rejection_high: float | None = number(None, above=1)
    """Maximum ratio; null follows `rejection`: token 5, sequence 2, geometric 1.001."""
    teacher_coef: float = derived(0.0, "teacher_coef", "teacher.kl_coef")
    """Coefficient of the reverse KL to the teacher; 0 without a teacher."""
    teacher_kl_cap: float | None = derived(None, "teacher_kl_cap", "teacher.kl_cap")
    """Maximum absolute KL estimate to the teacher of a token, in nats."""
    reward_weight: float = derived(1.0, "reward_weight", "teacher.reward_weight")
    """Factor of the reward's advantage; 1 without a teacher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_unused("turn_coef", "turn_credit", "shaped")
        self._check_unused("turn_discount", "turn_credit", "returns")
        self._check_unused("clip_ratio_c", "policy_loss", "clip")
        for key in ("rejection_low", "rejection_high"):
            self._check_unused(key, "rejection", "token", "sequence", "geometric")
        if self.entropy_target is None and self._is_set("entropy_step"):
            raise InvalidValueError(
                "entropy_step",
                f"is {self.entropy_step} and entropy_target is null; it has no effect, set entropy_target",
                "entropy_target",
            )
        if self.tis_cap is None and self.tis_level != "token":
            raise InvalidValueError(
                "tis_level", f"is {self.tis_level!r} and tis_cap is null; it has no effect, set tis_cap", "tis_cap"
            )
        # kl_cap may stay set: a recipe has it, and kl_coef 0 alone turns the term off.
        for key in ("kl_placement", "kl_estimator"):
            if not self.kl_coef and self._is_set(key):
                raise InvalidValueError(
                    key, f"is {getattr(self, key)!r} and kl_coef is 0; it has no effect, set kl_coef above 0", "kl_coef"
                )

    def _is_set(self, key: str) -> bool:
        """Return whether a key differs from its default."""
        return bool(getattr(self, key) != getattr(type(self), key))

    def _check_unused(self, key: str, other: str, *values: str) -> None:
        """Check that `key` has its default unless `other` is one of `values`."""
        value = getattr(self, other)
        if value not in values and self._is_set(key):
            raise InvalidValueError(
                key,
                f"is {getattr(self, key)} and {other} is {value!r}; it has no effect, set {other} to "
                f"{' or '.join(values)}",
                other,
            )

    @property
    def rejection_band(self) -> tuple[float, float]:
        """Minimum and maximum ratio of tokens with a loss."""
        low, high = _REJECTION_BANDS[self.rejection]
        return (
            low if self.rejection_low is None else self.rejection_low,
            high if self.rejection_high is None else self.rejection_high,
        )

    @property
    def corrects_engine(self) -> bool:
        """Whether the loss compares the learner's old log-probs with the engine's."""
        return self.tis_cap is not None or self.rejection != "none"
