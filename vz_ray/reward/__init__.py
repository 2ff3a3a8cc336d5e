"""What an episode is worth.

In: the texts of an episode's turns, its answer, the ground truth and counts of
zooms. Out: `RewardParts`, each part logged apart. Knows neither torch nor Ray
nor who played the episode. One small file per part, all on plain values; only
`total` and a user's own function know the type `Trajectory`. Two parts reach
outside, and only where an answer needs them: `judge` asks a model over HTTP,
and `math_answer` keeps one child process, because symbolic equality can hang
and a hang inside a big-integer power can only be killed.
"""

from vz_ray.episode.trajectory import UNPARSED
from vz_ray.reward.choice import choice_clean, choice_compat, options_of, parse_choice
from vz_ray.reward.format import format_ok
from vz_ray.reward.function import Invalid, load_function
from vz_ray.reward.number import number_equal, parse_number
from vz_ray.reward.ready import require_scorers
from vz_ray.reward.tool import earned_tool
from vz_ray.reward.total import NO_ANSWER, score

__all__ = [
    "NO_ANSWER",
    "UNPARSED",
    "Invalid",
    "choice_clean",
    "choice_compat",
    "earned_tool",
    "format_ok",
    "load_function",
    "number_equal",
    "options_of",
    "parse_choice",
    "parse_number",
    "require_scorers",
    "score",
]
