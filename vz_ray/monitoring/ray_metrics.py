"""Metrics of the catalogue as Ray exports them: from every process, by the agent of its node."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from vz_ray.monitoring.metric_catalog import METRIC_CATALOG, MetricSpec

log = logging.getLogger(__name__)


class RayMetrics:
    """Sets, adds to and observes metrics of one run, from this process.

    Whoever measures must not be disturbed by it: what goes wrong here is logged once, and does
    nothing outside a process of Ray's. Each call takes a few microseconds and waits for nobody.

    Args:
        run: Goes into the label `run` of all of them.

    Raises (every call):
        KeyError: The catalogue has no metric of that name.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._made: dict[str, Any] = {}
        self._failed = False

    def set(self, name: str, value: float, **labels: str) -> None:
        """A gauge. It must be set again from time to time: Ray forgets one that nobody has set lately."""
        self._on(METRIC_CATALOG[name], "set", value, labels)

    def add(self, name: str, amount: float, **labels: str) -> None:
        """To a counter; 0 makes it known, as a rate needs the value from before the first event."""
        # `inc` takes no 0; what it calls does.
        self._on(METRIC_CATALOG[name], "inc" if amount > 0 else "_record", max(0.0, amount), labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """One more in a histogram."""
        self._on(METRIC_CATALOG[name], "observe", value, labels)

    def _on(self, metric: MetricSpec, call: str, value: float, labels: dict[str, str]) -> None:
        try:
            if ray.is_initialized():
                getattr(self._instrument(metric), call)(value, tags={"run": self._run, **labels})
        except Exception as error:
            if not self._failed:
                log.warning("metrics are not exported: %s: %s: %s", metric.name, type(error).__name__, error)
            self._failed = True

    def _instrument(self, metric: MetricSpec) -> Any:
        if metric.name not in self._made:
            self._made[metric.name] = _make(metric)
        return self._made[metric.name]


def _make(metric: MetricSpec) -> Any:
    """Ray's own object for it."""
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.help, list(metric.buckets), metric.labels)
    return (Counter if metric.kind == "counter" else Gauge)(metric.name, metric.help, metric.labels)
