"""Total reward: R = 0.9 accuracy + 0.1 format + 0.5 [accuracy = 1 and a zoom] (paper, section on rewards).

Optional parts are added: penalties for tokens and frames, and the parts of a user function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vz_ray.config.reward import RewardConfig
from vz_ray.env.task import AnswerType, Task
from vz_ray.env.trajectory import UNPARSED_NOTE, EpisodeStatus, RewardParts, Trajectory
from vz_ray.rewards.accuracy import JUDGED_ANSWER_TYPES, AccuracyResult, score_accuracy
from vz_ray.rewards.format import is_well_formed
from vz_ray.rewards.judge import judge_api_key, prompt_files
from vz_ray.rewards.judge_protocol import JudgePrompt
from vz_ray.rewards.multiple_choice import LETTERS, parse_options
from vz_ray.rewards.turn_rewards import score_turns
from vz_ray.rewards.user_function import ACCURACY, InvalidEpisode, call_reward_function, load_reward_function
from vz_ray.utils.errors import UserError

NO_ANSWER = "no answer"


def check_scorers(config: RewardConfig, tasks: Sequence[Task], source: str) -> None:
    """Check that `tasks` of file `source` can be scored. Sends no request to the judge.

    Raises:
        UserError: The tasks need a judge and its model, key, prompt files or timeout are missing or wrong;
            or the user's reward function cannot be loaded.
    """
    if config.function:
        load_reward_function(config.function)
    judged = [task for task in tasks if task.answer_type in JUDGED_ANSWER_TYPES]
    if not judged:
        return
    if config.judge.model:
        judge_api_key(config.judge)
        for form, prompt in prompt_files(config.judge).items():
            JudgePrompt.load(prompt, form)
        min_timeout_s = 2 * config.judge.total_timeout_s
        if any(task.caption_questions for task in judged) and config.timeout_s <= min_timeout_s:
            raise UserError(
                f"timeouts.score_s is {config.timeout_s:g}; it must be above twice timeouts.judge_s "
                f"({config.judge.total_timeout_s:g}), because {source} has captions, which the judge scores "
                "in two steps"
            )
    elif not config.function:
        raise UserError(
            f"{len(judged)} of {len(tasks)} questions of {source} need a judge (first: "
            f"{judged[0].task_id!r}). Set reward.judge.model and reward.judge.base_url."
        )


def check_choices(tasks: Sequence[Task], source: str) -> None:
    """Check that the letter that answers a multiple-choice task of file `source` is one of its options.

    Raises:
        UserError: A task's answer is another letter; names the first task.
    """
    for task in tasks:
        answer = task.answer.strip()
        if task.answer_type is not AnswerType.MULTIPLE_CHOICE or answer not in LETTERS:
            continue
        options = parse_options(task.question)
        if options and answer not in options:
            raise UserError(
                f"{source}, question {task.task_id!r}: the solution is {answer!r}; it must be one of the options "
                f"{', '.join(options)}. Correct the solution or the options."
            )


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
    parts = _sum_parts(trajectory, task, turns, accuracy, config)
    if not config.function:
        return parts
    try:
        user_parts = call_reward_function(config.function, trajectory, task, parts)
    except InvalidEpisode as error:
        return _invalid_parts(f"user function: {error}")
    if ACCURACY in user_parts:
        accuracy = AccuracyResult(user_parts.pop(ACCURACY), extra_parts=accuracy.extra_parts)
    return _sum_parts(trajectory, task, turns, accuracy, config, user_parts)


def _invalid_parts(note: str) -> RewardParts:
    return RewardParts(total=0.0, accuracy=0.0, format=0.0, tool=0.0, valid=False, note=note)


def _sum_parts(
    trajectory: Trajectory,
    task: Task,
    turns: Sequence[str],
    accuracy: AccuracyResult,
    config: RewardConfig,
    user_parts: Mapping[str, float] | None = None,
) -> RewardParts:
    if accuracy.invalid_reason:
        return _invalid_parts(accuracy.invalid_reason)
    user_parts = user_parts or {}
    well_formed = float(is_well_formed(turns, config.max_zoom_frames))
    # The released code counts attempted zooms: it also rewards a malformed call.
    zooms = trajectory.num_zoom_calls if config.scorer == "compat" else len(trajectory.zooms)
    tool = float(accuracy.value == 1 and zooms >= 1)
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
        turns=score_turns(trajectory, task, config.turns),
    )


def _compute_penalties(trajectory: Trajectory, config: RewardConfig) -> dict[str, float]:
    """Return the penalties with a nonzero weight."""
    penalties: dict[str, float] = {}
    if config.length_penalty:
        tokens = sum(len(turn.action.token_ids) for turn in trajectory.turns)
        penalties["length"] = length_penalty(tokens, config.length_free_tokens, config.length_full_tokens)
    if config.frame_cost:
        penalties["frames"] = frame_cost(trajectory.num_zoom_frames, config.frame_cost_full_frames)
    return penalties


def length_penalty(tokens: int, free_tokens: int, max_tokens: int) -> float:
    """Return 0 up to `free_tokens`, -1 from `max_tokens`, and linear in between.

    This is the soft overlong punishment of DAPO.

    Args:
        tokens: Tokens that the policy generated in the episode, over all turns.
        free_tokens: Tokens without penalty.
        max_tokens: Tokens with the full penalty; above `free_tokens`.
    """
    return -min(1.0, max(0, tokens - free_tokens) / (max_tokens - free_tokens))


def frame_cost(frames: int, max_frames: int) -> float:
    """Return 0 without zooms, -1 from `max_frames`, and linear in between.

    Args:
        frames: Frames served for zooms. The overview does not count: the policy does not choose it.
        max_frames: Frames with the full cost.
    """
    return -min(1.0, frames / max_frames)


def _note(trajectory: Trajectory, accuracy: AccuracyResult) -> str:
    if trajectory.answer is None:
        return NO_ANSWER
    return "" if accuracy.parsed else f"{UNPARSED_NOTE}: {trajectory.answer[:80]!r}"
