"""What a run's rewards need, looked for before anything is started."""

from __future__ import annotations

from collections.abc import Sequence

from vz_ray.config.reward import RewardConfig
from vz_ray.data.task import Task
from vz_ray.observe.errors import UserError
from vz_ray.reward.accuracy import JUDGED
from vz_ray.reward.function import load_function
from vz_ray.reward.judge import api_key, prompts
from vz_ray.reward.verdict import JudgeWording


def require_scorers(config: RewardConfig, tasks: Sequence[Task], source: str) -> None:
    """Everything that scoring `tasks` will take is there; the judge itself is not asked.

    Raises:
        UserError: A judge is needed and there is none, or no key or prompt for it, or too little time;
            the user's own function cannot be loaded.
    """
    if config.function:
        load_function(config.function)
    judged = [task for task in tasks if task.answer_type in JUDGED]
    if not judged:
        return
    if config.judge.model:
        api_key(config.judge)
        for form, prompt in prompts(config.judge).items():
            JudgeWording.load(prompt, form)
        if any(task.checks for task in judged) and config.deadline_s <= 2 * config.judge.deadline_s:
            raise UserError(
                f"reward.deadline_s is {config.deadline_s:g}; {source} has captions, which are judged in two "
                f"steps: set it above twice reward.judge.deadline_s ({config.judge.deadline_s:g})"
            )
    elif not config.function:
        raise UserError(
            f"{len(judged)} of {len(tasks)} questions of {source} need a judge, the first is "
            f"{judged[0].task_id!r}: set reward.judge.model and reward.judge.base_url"
        )
