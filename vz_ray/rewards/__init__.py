"""Rewards of episodes.

In: a trajectory, its task and the reward weights. Out: `RewardParts`.
Each part has its own module and takes plain values; only `scorer` and user functions see `Trajectory`.
`judge` calls a model over HTTP. `math_answer` runs math-verify in a child process that can be killed.
Must not import torch or Ray.
"""

from vz_ray.env.trajectory import UNPARSED_NOTE
from vz_ray.rewards.format import is_well_formed
from vz_ray.rewards.multiple_choice import choice_correct, choice_correct_compat, parse_choice, parse_options
from vz_ray.rewards.numeric import numbers_equal, parse_number
from vz_ray.rewards.scorer import NO_ANSWER, check_choices, check_scorers, score_episode
from vz_ray.rewards.user_function import InvalidEpisode, load_reward_function

__all__ = [
    "NO_ANSWER",
    "UNPARSED_NOTE",
    "InvalidEpisode",
    "check_choices",
    "check_scorers",
    "choice_correct",
    "choice_correct_compat",
    "is_well_formed",
    "load_reward_function",
    "numbers_equal",
    "parse_choice",
    "parse_number",
    "parse_options",
    "score_episode",
]
