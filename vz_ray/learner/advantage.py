"""Group-relative advantages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vz_ray.env.trajectory import Group


def compute_advantages(rewards: Sequence[float], kind: str = "grpo") -> NDArray[np.float64]:
    """Return the advantages within one group, `[n]`.

    `grpo` is (r - mean) / (std + 1e-6), with the sample standard deviation as in the released VideoZoomer
    code. `dr_grpo` is r - mean, which does not amplify groups with a small spread of rewards.

    Example: `compute_advantages([1, 0])` is about `[0.707, -0.707]`.
    """
    r = np.asarray(rewards, dtype=np.float64)
    centred = r - r.mean()
    if kind == "dr_grpo":
        return centred
    return centred / (_std(r) + 1e-6)


def is_informative(group: Group, min_std: float = 1e-4) -> bool:
    """Return whether all samples have valid rewards and the rewards differ.

    A sample without a valid reward excludes its whole group: a score of 0 would change the advantages of the
    other samples.
    """
    rewards = [t.reward for t in group.trajectories]
    if not rewards or any(reward is None or not reward.valid for reward in rewards):
        return False
    return _std(np.asarray(group.rewards)) >= min_std


def _std(rewards: NDArray[np.float64]) -> float:
    return float(rewards.std(ddof=1)) if len(rewards) > 1 else 0.0
