"""How good an agent is, and what it costs.

In: played and scored episodes with their tasks. Out: figures with intervals, why
wrong episodes went wrong, per-sample logs that an interrupted evaluation continues, `summary.json`, and
tables for the terminal. Must not know how a model is trained.
"""

from vz_ray.episode.failure import Failure
from vz_ray.evaluate.failures import count_failures, failure_of
from vz_ray.evaluate.interval import Interval, bootstrap, paired_difference
from vz_ray.evaluate.metrics import EvalMetrics, measure, step_metrics
from vz_ray.evaluate.results import EvalLog, EvalResult, read_results
from vz_ray.evaluate.summary import build_summary, record_stage, write_summary

__all__ = [
    "EvalLog",
    "EvalMetrics",
    "EvalResult",
    "Failure",
    "Interval",
    "bootstrap",
    "build_summary",
    "count_failures",
    "failure_of",
    "measure",
    "paired_difference",
    "read_results",
    "record_stage",
    "step_metrics",
    "write_summary",
]
