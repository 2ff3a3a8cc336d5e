"""Total reward: R = 0.9 accuracy + 0.1 format + 0.5 [accuracy = 1 and a zoom] (paper, section on rewards).

Optional parts are added: penalties for tokens and frames, and the parts of a user function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vz_ray.config.reward import RewardConfig
from vz_ray.env.task import Task
from vz_ray.env.trajectory import UNPARSED_NOTE, EpisodeStatus, RewardParts, Trajectory
from vz_ray.rewards.accuracy import AccuracyResult, score_accuracy
from vz_ray.rewards.format import is_well_formed
from vz_ray.rewards.shaping import frame_cost, length_penalty
from vz_ray.rewards.user_function import ACCURACY, InvalidEpisode, call_reward_function

NO_ANSWER = "no answer"


def earns_tool_reward(accuracy: float, zooms: int) -> bool:
    """Return whether an episode earns the tool reward (paper: 0.5 [accuracy = 1 and a zoom]).

    Args:
        accuracy: In `[0, 1]`.
        zooms: Number of executed zooms. The `compat` scorer passes attempted zooms, like the released code,
            which also rewards a malformed call.
    """
    return accuracy == 1 and zooms >= 1


def score_episode(trajectory: Trajectory, task: Task, config: RewardConfig) -> RewardParts:
    """Score an episode. The parts are unweighted; `total` is their weighted sum.

    A failed episode, or an answer that cannot be scored, is marked invalid. It is excluded together with its
    group and never counts as 0. Blocks during judge requests, for at most `config.judge.total_timeout_s`
    (twice for captions).

    Raises:
        UserError: The judge's key or prompt file is missing; or the user function is missing, raises, or
            returns invalid parts.
    """
    if trajectory.status is EpisodeStatus.FAILED:
        return _invalid_parts(f"failed: {trajectory.error}")
    turns = [turn.text for turn in trajectory.turns]
    accuracy = score_accuracy(trajectory.answer, turns, task, config)
    parts = _sum_parts(trajectory, turns, accuracy, config)
    if not config.function:
        return parts
    try:
        user_parts = call_reward_function(config.function, trajectory, task, parts)
    except InvalidEpisode as error:
        return _invalid_parts(f"user function: {error}")
    if ACCURACY in user_parts:
        accuracy = AccuracyResult(user_parts.pop(ACCURACY), extra_parts=accuracy.extra_parts)
    return _sum_parts(trajectory, turns, accuracy, config, user_parts)


def _invalid_parts(note: str) -> RewardParts:
    return RewardParts(total=0.0, accuracy=0.0, format=0.0, tool=0.0, valid=False, note=note)


def _sum_parts(
    trajectory: Trajectory,
    turns: Sequence[str],
    accuracy: AccuracyResult,
    config: RewardConfig,
    user_parts: Mapping[str, float] | None = None,
) -> RewardParts:
    if accuracy.invalid_reason:
        return _invalid_parts(accuracy.invalid_reason)
    user_parts = user_parts or {}
    well_formed = float(is_well_formed(turns, config.max_zoom_frames))
    zooms = trajectory.num_zoom_calls if config.scorer == "compat" else len(trajectory.zooms)
    tool = float(earns_tool_reward(accuracy.value, zooms))
    penalties = _compute_penalties(trajectory, config)
    total = config.accuracy * accuracy.value + config.format * well_formed + config.tool * tool
    total += config.length_penalty * penalties.get("length", 0.0)
    total += config.frame_cost * penalties.get("frames", 0.0)
    return RewardParts(
        total=total + sum(user_parts.values()),
        accuracy=accuracy.value,
        format=well_formed,
        tool=tool,
        note=_note(trajectory, accuracy),
        extra={**accuracy.extra_parts, **penalties, **user_parts},
    )


def _compute_penalties(trajectory: Trajectory, config: RewardConfig) -> dict[str, float]:
    """Return the penalties with a nonzero weight."""
    penalties: dict[str, float] = {}
    if config.length_penalty:
        tokens = sum(len(turn.action.token_ids) for turn in trajectory.turns)
        penalties["length"] = length_penalty(tokens, config.length_free_tokens, config.length_full_tokens)
    if config.frame_cost:
        zoom_frames = len(trajectory.frame_refs) - len(trajectory.prompt.frame_refs)
        penalties["frames"] = frame_cost(zoom_frames, config.frame_cost_full_frames)
    return penalties


def _note(trajectory: Trajectory, accuracy: AccuracyResult) -> str:
    if trajectory.answer is None:
        return NO_ANSWER
    return "" if accuracy.parsed else f"{UNPARSED_NOTE}: {trajectory.answer[:80]!r}"
