"""How much better than its siblings each trajectory was."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vz_ray.env.trajectory import Group


def compute_advantages(rewards: Sequence[float], kind: str = "grpo") -> NDArray[np.float64]:
    """Advantages within one group, `[n]`.

    `grpo` is (r - mean) / (std + 1e-6), with the sample standard deviation as
    in the released VideoZoomer code; `dr_grpo` is r - mean, which does not
    favour questions whose rewards hardly vary.

    Example: `advantages([1, 0])` is about `[0.707, -0.707]`.
    """
    r = np.asarray(rewards, dtype=np.float64)
    centred = r - r.mean()
    if kind == "dr_grpo":
        return centred
    return centred / (_spread(r) + 1e-6)


def is_informative(group: Group, min_std: float = 1e-4) -> bool:
    """Whether a group is worth a step: every sample was judged, and rewards differ.

    A sample without a reward, or one that could not be judged, drops its
    whole group: scoring it 0 would move its siblings' advantages.
    """
    rewards = [t.reward for t in group.trajectories]
    if not rewards or any(reward is None or not reward.valid for reward in rewards):
        return False
    return _spread(np.asarray(group.rewards)) >= min_std


def _spread(rewards: NDArray[np.float64]) -> float:
    return float(rewards.std(ddof=1)) if len(rewards) > 1 else 0.0
