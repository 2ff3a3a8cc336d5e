"""What an episode is worth.

In: the texts of an episode's turns, its answer, the ground truth and counts of
zooms. Out: `RewardParts`, each part logged apart. Knows neither torch nor Ray
nor who played the episode. One small file per part, all on plain values; only
`total` and a user's own function know the type `Trajectory`. Two parts reach
outside, and only where an answer needs them: `judge` asks a model over HTTP,
and `math_answer` keeps one child process, because symbolic equality can hang
and a hang inside a big-integer power can only be killed.
"""

from vz_ray.env.trajectory import UNPARSED_NOTE
from vz_ray.rewards.format import is_well_formed
from vz_ray.rewards.multiple_choice import choice_correct, choice_correct_compat, parse_choice, parse_options
from vz_ray.rewards.numeric import numbers_equal, parse_number
from vz_ray.rewards.requirements import check_scorers
from vz_ray.rewards.scorer import NO_ANSWER, score_episode
from vz_ray.rewards.tool_use import earns_tool_reward
from vz_ray.rewards.user_function import InvalidEpisode, load_reward_function

__all__ = [
    "NO_ANSWER",
    "UNPARSED_NOTE",
    "InvalidEpisode",
    "choice_correct",
    "choice_correct_compat",
    "earns_tool_reward",
    "is_well_formed",
    "load_reward_function",
    "numbers_equal",
    "parse_options",
    "parse_choice",
    "parse_number",
    "check_scorers",
    "score_episode",
]
