"""What a run's rewards need, looked for before anything is started."""

from __future__ import annotations

from collections.abc import Sequence

from vz_ray.config.reward import RewardConfig
from vz_ray.env.task import Task
from vz_ray.rewards.accuracy import JUDGED_ANSWER_TYPES
from vz_ray.rewards.judge import judge_api_key, prompt_files
from vz_ray.rewards.judge_protocol import JudgePrompt
from vz_ray.rewards.user_function import load_reward_function
from vz_ray.utils.errors import UserError


def check_scorers(config: RewardConfig, tasks: Sequence[Task], source: str) -> None:
    """Everything that scoring `tasks` will take is there; the judge itself is not asked.

    Raises:
        UserError: A judge is needed and there is none, or no key or prompt for it, or too little time;
            the user's own function cannot be loaded.
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
        if (
            any(task.caption_questions for task in judged)
            and config.timeout_s <= 2 * config.judge.total_timeout_s
        ):
            raise UserError(
                f"timeouts.score_s is {config.timeout_s:g}; {source} has captions, which are judged in two "
                f"steps: set it above twice timeouts.judge_s ({config.judge.total_timeout_s:g})"
            )
    elif not config.function:
        raise UserError(
            f"{len(judged)} of {len(tasks)} questions of {source} need a judge, the first is "
            f"{judged[0].task_id!r}: set reward.judge.model and reward.judge.base_url"
        )
