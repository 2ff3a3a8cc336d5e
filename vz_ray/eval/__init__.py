"""How good an agent is, and what it costs.

In: played and scored episodes with their tasks. Out: figures with intervals, why
wrong episodes went wrong, per-sample logs that an interrupted evaluation continues, `summary.json`, and
tables for the terminal. Must not know how a model is trained.
"""

from vz_ray.env.failure_modes import FailureMode
from vz_ray.eval.bootstrap import ConfidenceInterval, bootstrap_mean, paired_difference
from vz_ray.eval.eval_log import EvalLog, EvalResult, read_results
from vz_ray.eval.eval_metrics import EvalMetrics, compute_eval_metrics, step_metrics
from vz_ray.eval.failure_counts import classify_failure, count_failures
from vz_ray.eval.run_summary import build_summary, write_summary

__all__ = [
    "EvalLog",
    "EvalMetrics",
    "EvalResult",
    "FailureMode",
    "ConfidenceInterval",
    "bootstrap_mean",
    "build_summary",
    "count_failures",
    "classify_failure",
    "compute_eval_metrics",
    "paired_difference",
    "read_results",
    "step_metrics",
    "write_summary",
]
