"""Advantages within a group: of whole trajectories, and of their turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from vz_ray.config.loss import LossConfig
from vz_ray.env.trajectory import EpisodeStatus, Group, SampledAction, Trajectory

Floats = NDArray[np.float64]


def compute_advantages(rewards: Sequence[float], kind: str = "grpo") -> Floats:
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


def is_trainable(group: Group, config: LossConfig) -> bool:
    """Return whether the learner trains on a group.

    Without a teacher, the group must be informative. A teacher gives a signal for groups of equal rewards, too: their
    rewards need only be valid, and may be missing if `reward_weight` is 0. Every trajectory must have a sampled turn.
    """
    if not config.teacher_coef:
        return is_informative(group, config.min_reward_std)
    if not group.trajectories or any(not trajectory.turns for trajectory in group.trajectories):
        return False
    rewards = [trajectory.reward for trajectory in group.trajectories]
    return not config.reward_weight or all(reward is not None and reward.valid for reward in rewards)


def break_ties(group: Group, coef: float) -> Group:
    """Return the group with the rewards r - coef (n - min n) / (max n - min n) of tied samples.

    n is the number of zoomed frames. Samples are tied if their answers are correct and their rewards are equal; min
    and max are over the tied samples. It is the length reward of Kimi k1.5 (arXiv 2501.12599) for frames, and does not
    compare wrong answers.

    Example: rewards 1.5, 1.5, 1.5, 0 with 8, 16, 12, 4 frames and coef 0.05 -> `[1.5, 1.45, 1.475, 0]`.
    """
    if not coef:
        return group
    frames_by_reward: dict[float, list[int]] = {}
    for trajectory in group.trajectories:
        if trajectory.reward and trajectory.reward.accuracy == 1:
            frames_by_reward.setdefault(trajectory.reward.total, []).append(trajectory.num_zoom_frames)

    def lower(trajectory: Trajectory) -> Trajectory:
        reward = trajectory.reward
        if reward is None or reward.accuracy != 1:
            return trajectory
        frames = frames_by_reward[reward.total]
        share = (trajectory.num_zoom_frames - min(frames)) / max(1, max(frames) - min(frames))
        return replace(trajectory, reward=replace(reward, total=reward.total - coef * share))

    return replace(group, trajectories=tuple(map(lower, group.trajectories)))


def outcome_advantages(group: Group, config: LossConfig) -> Floats:
    """Return the advantage of each trajectory's outcome, `[n]`."""
    return compute_advantages(break_ties(group, config.frame_tie_break).rewards, config.advantage_estimator)


def group_advantages(group: Group, config: LossConfig) -> list[Floats]:
    """Return the advantages of each trajectory from its rewards: `[1]`, or `[turns]` with a `turn_credit`.

    They are multiplied by `reward_weight`, and 0 if the group is not informative: only a teacher trains on it.
    """
    if config.teacher_coef and not (config.reward_weight and is_informative(group, config.min_reward_std)):
        return [np.zeros(1 if config.turn_credit == "none" else len(t.turns)) for t in group.trajectories]
    group = break_ties(group, config.frame_tie_break)
    outcome = compute_advantages(group.rewards, config.advantage_estimator)
    if config.turn_credit == "none":
        advantages = [outcome[i : i + 1] for i in range(len(outcome))]
    else:
        advantages = _TURN_CREDITS[config.turn_credit](group, outcome, config)
    return [config.reward_weight * values for values in advantages]


def _shaped_advantages(group: Group, outcome: Floats, config: LossConfig) -> list[Floats]:
    """Return A + coef (r_k - mean) / (std + 1e-6) for turn k: outcome and normalized turn reward.

    MT-GRPO (arXiv 2505.11821). Mean and standard deviation are over the k-th turns of the group that call the zoom
    tool. Turns without a call, such as answers, have the advantage of the outcome, so that the turn rewards compare
    zooms with zooms and neither reward nor punish zooming.
    """
    advantages = [np.full(len(t.turns), value) for t, value in zip(group.trajectories, outcome, strict=True)]
    for k, turns in enumerate(zip_longest(*(t.turns for t in group.trajectories))):
        zooming = [i for i, turn in enumerate(turns) if turn is not None and turn.zoom is not None]
        if zooming:
            rewards = [_turn_rewards(group.trajectories[i])[k] for i in zooming]
            shaping = config.turn_coef * compute_advantages(rewards, config.advantage_estimator)
            for i, value in zip(zooming, shaping, strict=True):
                advantages[i][k] += value
    return advantages


def _return_advantages(group: Group, outcome: Floats, config: LossConfig) -> list[Floats]:
    """Return (R_k - mean) / (std + 1e-6) for turn k, with the discounted return R_k = sum_l>=k discount^(l-k) r_l.

    GTPO (arXiv 2511.14846). The last turn's reward includes the total reward of the trajectory. Mean and standard
    deviation are over the k-th turns of the group. A turn without a counterpart has the advantage of the outcome.
    """
    returns = [discounted_returns(t, config.turn_discount) for t in group.trajectories]
    advantages = [np.full(len(values), value) for values, value in zip(returns, outcome, strict=True)]
    for k in range(max(map(len, returns))):
        members = [i for i, values in enumerate(returns) if k < len(values)]
        if len(members) > 1:
            values = compute_advantages([returns[i][k] for i in members], config.advantage_estimator)
            for i, value in zip(members, values, strict=True):
                advantages[i][k] = value
    return advantages


_TURN_CREDITS: Mapping[str, Callable[[Group, Floats, LossConfig], list[Floats]]] = {
    "shaped": _shaped_advantages,
    "returns": _return_advantages,
}


def discounted_returns(trajectory: Trajectory, discount: float) -> Floats:
    """Return the discounted return from each turn on, `[turns]`.

    Example: turn rewards 0.5 and 0, total reward 1, discount 0.9 -> `[1.4, 1.0]`.
    """
    rewards = np.asarray(_turn_rewards(trajectory))
    if trajectory.reward is not None:
        rewards[-1] += trajectory.reward.total
    powers = discount ** np.arange(len(rewards))
    return np.array([rewards[k:] @ powers[: len(rewards) - k] for k in range(len(rewards))])


def _turn_rewards(trajectory: Trajectory) -> tuple[float, ...]:
    """Return one reward per turn.

    Raises:
        ValueError: The trajectory was scored without turn rewards.
    """
    rewards = trajectory.reward.turns if trajectory.reward else ()
    if len(rewards) != len(trajectory.turns):
        raise ValueError(
            f"trajectory {trajectory.id} has {len(rewards)} turn rewards for {len(trajectory.turns)} turns; "
            "learner.loss.turn_credit requires a weight in reward.turns"
        )
    return rewards


def turns_with_loss(trajectory: Trajectory, mask_truncated: str) -> Floats:
    """Return 1 for turns with a loss and 0 for masked ones: `[1]` without a mask, else `[turns]`.

    Args:
        mask_truncated: `none`; `turn`: masks turns that reached their token limit; `episode`: masks truncated
            episodes, as the overlong filtering of DAPO (arXiv 2503.14476).
    """
    if mask_truncated == "none":
        return np.ones(1)
    if mask_truncated == "episode":
        return np.full(len(trajectory.turns), float(trajectory.status is not EpisodeStatus.TRUNCATED))
    actions = [turn.action for turn in trajectory.turns]
    return np.array([not (isinstance(a, SampledAction) and a.stop_reason == "length") for a in actions], dtype=float)


def _std(rewards: Floats) -> float:
    return float(rewards.std(ddof=1)) if len(rewards) > 1 else 0.0
