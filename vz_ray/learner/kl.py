"""Estimates of KL divergences from the log-probs of sampled tokens (Schulman, "Approximating KL divergence")."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

# exp(20) is finite in float32; larger log-ratios indicate a bug and appear in `ratio_max`.
MAX_LOG_RATIO = 20.0


def low_variance_kl(new: Tensor, reference: Tensor) -> Tensor:
    """Return the k3 estimate of KL(new || reference) per token, `[B, S]`; never negative.

    exp(d) - d - 1 with d = reference - new.
    """
    d = (reference - new).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return d.exp() - d - 1


KL_ESTIMATORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": lambda new, reference: new - reference,
    "k2": lambda new, reference: 0.5 * (new - reference).square(),
    "k3": low_variance_kl,
    "abs": lambda new, reference: (new - reference).abs(),
}
"""Estimate of each `kl_estimator`.

k1 and k3 are unbiased on samples of the new policy, k2 and abs are not. As a term of the loss only k2 has the gradient
of the KL in expectation; that of k1 is 0 in expectation.
"""


def estimate_kl(new: Tensor, reference: Tensor, kind: str, cap: float | None = None) -> Tensor:
    """Return an estimate of KL(new || reference) per token, `[B, S]`, between -cap and cap.

    verl and the released VideoZoomer code cap k3 at 10. Beyond the cap the gradient is 0.

    Args:
        new: `[B, S]` log-probs of the policy.
        reference: `[B, S]` log-probs of the reference model.
        kind: Key of `KL_ESTIMATORS`.
        cap: In nats; None disables it.
    """
    kl = KL_ESTIMATORS[kind](new, reference)
    return kl if cap is None else kl.clamp(-cap, cap)


def distillation_advantages(old: Tensor, teacher: Tensor, coef: float, cap: float | None = None) -> Tensor:
    """Return -coef (log p_old - log p_teacher) per token, `[B, S]`, constant.

    On-policy distillation (Thinking Machines, 2025): on the student's samples, the difference of log-probs is an
    unbiased estimate of the reverse KL(student || teacher) at the token. As an advantage it has the policy gradient
    of that KL, with discount 0: later tokens do not count for a token.

    Example: old log-prob -1, teacher's -3, coef 0.5 -> -1.

    Args:
        old: `[B, S]` log-probs before the first update of the step.
        teacher: `[B, S]` log-probs of the teacher.
        cap: Maximum absolute difference in nats; None disables it.
    """
    return -coef * estimate_kl(old, teacher, "k1", cap).detach()
