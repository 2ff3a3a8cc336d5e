"""What a run's rewards need, looked for before anything is started."""

from __future__ import annotations

from collections.abc import Sequence

from vz_ray.config.reward import RewardConfig
from vz_ray.data.task import Task
from vz_ray.observe.errors import UserError
from vz_ray.reward.accuracy import JUDGED
from vz_ray.reward.function import load_function
from vz_ray.reward.judge import api_key
from vz_ray.reward.verdict import JudgeWording


def require_scorers(config: RewardConfig, tasks: Sequence[Task], source: str) -> None:
    """Everything that scoring `tasks` will take is there; the judge itself is not asked.

    Raises:
        UserError: A judge is needed and there is none, or no key or prompt for it; the user's
            own function cannot be loaded.
    """
    if config.function:
        load_function(config.function)
    judged = [task for task in tasks if task.answer_type in JUDGED]
    if not judged:
        return
    if config.judge.model:
        api_key(config.judge)
        for prompt in (config.judge.prompt, config.judge.graded_prompt):
            JudgeWording.load(prompt)
    elif not config.function:
        raise UserError(
            f"{len(judged)} of {len(tasks)} questions of {source} need a judge, the first is "
            f"{judged[0].task_id!r}: set reward.judge.model and reward.judge.base_url"
        )
