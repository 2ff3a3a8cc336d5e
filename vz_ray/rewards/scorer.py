"""The sum: R = 0.9 accuracy + 0.1 format + 0.5 [accuracy = 1 and a zoom] (paper, section on rewards).

Optional parts are added to it: costs of length and of frames, and those of a
user's own function. The only file of this room, beside that function, that
knows `Trajectory`; it takes plain values out of it for the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vz_ray.config.reward import RewardConfig
from vz_ray.env.task import Task
from vz_ray.env.trajectory import UNPARSED_NOTE, EpisodeStatus, RewardParts, Trajectory
from vz_ray.rewards.accuracy import AccuracyResult, score_accuracy
from vz_ray.rewards.format import is_well_formed
from vz_ray.rewards.shaping import frame_cost, length_penalty
from vz_ray.rewards.tool_use import earns_tool_reward
from vz_ray.rewards.user_function import ACCURACY, InvalidEpisode, call_reward_function

NO_ANSWER = "no answer"


def _invalid(note: str) -> RewardParts:
    return RewardParts(total=0.0, accuracy=0.0, format=0.0, tool=0.0, valid=False, note=note)


def score_episode(trajectory: Trajectory, task: Task, config: RewardConfig) -> RewardParts:
    """Scores an episode; parts are unweighted, `total` is their weighted sum.

    A failed episode and a question that nobody here can judge are *invalid*:
    they drop their group and never count as 0. May block while a judge is
    asked, for `config.judge.deadline_s` at most.

    Raises:
        UserError: The judge's key or prompt file is missing, or the user's own
            function is not there, raises, or returns what is no set of parts.
    """
    if trajectory.status is EpisodeStatus.FAILED:
        return _invalid(f"failed: {trajectory.error}")
    turns = [turn.text for turn in trajectory.turns]
    found = score_accuracy(trajectory.answer, turns, task, config)
    parts = _parts(trajectory, turns, found, config)
    if not config.function:
        return parts
    try:
        own = call_reward_function(config.function, trajectory, task, parts)
    except InvalidEpisode as error:
        return _invalid(f"own function: {error}")
    if ACCURACY in own:
        found = AccuracyResult(own[ACCURACY], extra_parts=found.extra_parts)
    return _parts(trajectory, turns, found, config, {k: v for k, v in own.items() if k != ACCURACY})


def _parts(
    trajectory: Trajectory,
    turns: Sequence[str],
    found: AccuracyResult,
    config: RewardConfig,
    own: Mapping[str, float] | None = None,
) -> RewardParts:
    """All parts, and their sum."""
    if found.invalid_reason:
        return _invalid(found.invalid_reason)
    own = own or {}
    shaped = float(is_well_formed(turns, config.max_zoom_frames))
    zooms = trajectory.num_zoom_calls if config.scorer == "compat" else len(trajectory.zooms)
    tool = float(earns_tool_reward(found.value, zooms))
    costs = _costs(trajectory, config)
    total = config.accuracy * found.value + config.format * shaped + config.tool * tool
    total += config.length_penalty * costs.get("length", 0.0) + config.frame_cost * costs.get("frames", 0.0)
    return RewardParts(
        total=total + sum(own.values()),
        accuracy=found.value,
        format=shaped,
        tool=tool,
        note=_note(trajectory, found),
        extra={**found.extra_parts, **costs, **own},
    )


def _costs(trajectory: Trajectory, config: RewardConfig) -> dict[str, float]:
    """Those that are switched on."""
    costs: dict[str, float] = {}
    if config.length_penalty:
        tokens = sum(len(turn.action.token_ids) for turn in trajectory.turns)
        costs["length"] = length_penalty(tokens, config.length_free_tokens, config.length_full_tokens)
    if config.frame_cost:
        zoomed = len(trajectory.frame_refs) - len(trajectory.prompt.frame_refs)
        costs["frames"] = frame_cost(zoomed, config.frame_cost_full_frames)
    return costs


def _note(trajectory: Trajectory, found: AccuracyResult) -> str:
    if trajectory.answer is None:
        return NO_ANSWER
    return "" if found.parsed else f"{UNPARSED_NOTE}: {trajectory.answer[:80]!r}"
