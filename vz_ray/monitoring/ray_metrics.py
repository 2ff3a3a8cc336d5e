"""Export of the metric catalog through Ray: each process reports to the metrics agent of its node."""

from __future__ import annotations

import functools
import logging
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from vz_ray.monitoring.metric_catalog import METRIC_CATALOG, MetricSpec

log = logging.getLogger(__name__)


class RayMetrics:
    """Records metrics of one run from this process.

    Errors are logged once and never raised. Outside a Ray process, calls do nothing. A call takes a few
    microseconds and does not block.

    Args:
        run: Value of the label `run` of all metrics.

    Raises (every call):
        KeyError: The catalog has no metric with that name.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._instrument = functools.cache(_create_instrument)
        self._failed = False

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge. Ray drops gauges that are not set regularly."""
        self._record(METRIC_CATALOG[name], "set", value, labels)

    def add(self, name: str, amount: float, **labels: str) -> None:
        """Add to a counter. Adding 0 creates the series, which `rate()` needs before the first event."""
        # `inc` rejects 0; `_record`, which it calls, accepts it.
        self._record(METRIC_CATALOG[name], "inc" if amount > 0 else "_record", max(0.0, amount), labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add an observation to a histogram."""
        self._record(METRIC_CATALOG[name], "observe", value, labels)

    def _record(self, metric: MetricSpec, method: str, value: float, labels: dict[str, str]) -> None:
        try:
            if ray.is_initialized():
                getattr(self._instrument(metric), method)(value, tags={"run": self._run, **labels})
        except Exception as error:
            if not self._failed:
                log.warning("Metric export failed: %s: %s: %s", metric.name, type(error).__name__, error)
            self._failed = True


def _create_instrument(metric: MetricSpec) -> Any:
    """Create the Ray metric for a spec."""
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.help, list(metric.buckets), metric.labels)
    return (Counter if metric.kind == "counter" else Gauge)(metric.name, metric.help, metric.labels)
