"""Lifetime of a run's monitoring: monitor, heartbeat, traces and trackers."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import ray

from vz_ray.config.monitoring import MonitoringConfig, TrackingConfig
from vz_ray.decode import DecodePool
from vz_ray.monitoring.live_status import RunKind, RunState
from vz_ray.monitoring.ray_metrics import RayMetrics
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.monitoring.tracing import TraceExporter
from vz_ray.monitoring.trackers import check_trackers_installed, flatten_config, open_trackers
from vz_ray.rollout.rollout_scheduler import RolloutScheduler
from vz_ray.runtime.heartbeat import Heartbeat
from vz_ray.runtime.run_monitor import RunMonitor
from vz_ray.utils.interrupt import StopRequested

log = logging.getLogger(__name__)


def configured_trackers(config: TrackingConfig) -> dict[str, str]:
    """Return the value of each tracker's config key; empty if the tracker is disabled."""
    return {"wandb_project": config.wandb_project, "mlflow_tracking_uri": config.mlflow_tracking_uri}


def check_monitoring(config: TrackingConfig) -> None:
    """Raise `UserError` if a configured tracker or trace exporter lacks its package."""
    check_trackers_installed(configured_trackers(config))
    if isinstance(config, MonitoringConfig) and config.otlp_endpoint:
        TraceExporter(config.otlp_endpoint, 0.0, {}).close()


@asynccontextmanager
async def monitor_run(
    config: TrackingConfig,
    run_dir: RunDir,
    pool: DecodePool,
    rollout: RolloutScheduler | None = None,
    *,
    run_kind: RunKind = RunKind.RL,
    metrics_file: str = "metrics.jsonl",
) -> AsyncIterator[RunMonitor]:
    """Monitor a run inside the block; write its final state when the block ends.

    Args:
        rollout: Rollout scheduler; None for runs without workers.
        run_kind, metrics_file: As for `RunMonitor`.

    Raises:
        UserError: A tracker or the trace exporter cannot be opened. Later errors are logged and counted.
    """
    run_config = await asyncio.to_thread(flatten_config, run_dir.config)
    trackers = await asyncio.to_thread(open_trackers, configured_trackers(config), run_dir, run_config)
    monitor = RunMonitor(
        run_dir.name,
        RayMetrics(run_dir.name),
        _make_trace_exporter(config, run_dir),
        trackers,
        run_kind=run_kind,
        metrics_file=metrics_file,
    )
    workers = None if rollout is None else rollout.pool
    heartbeat = Heartbeat(monitor, run_dir, workers, pool, config.poll_interval_s, prometheus_targets)
    if rollout is not None:
        rollout.on_accepted = monitor.on_episode
    heartbeat_task = asyncio.create_task(heartbeat.run())
    log.info("Monitoring %s from process %d; metrics at %s", run_dir.path, os.getpid(), prometheus_targets())
    state, error = RunState.FAILED, ""
    try:
        yield monitor
        state = RunState.ENDED
    except (StopRequested, asyncio.CancelledError, KeyboardInterrupt):
        state = RunState.STOPPED
        raise
    except BaseException as exception:
        error = f"{type(exception).__name__}: {exception}"
        raise
    finally:
        if rollout is not None:
            rollout.on_accepted = lambda _: None
        heartbeat_task.cancel()
        await asyncio.gather(heartbeat_task, return_exceptions=True)
        await heartbeat.finish(state, error)
        await asyncio.to_thread(_close_sinks, monitor)


def _make_trace_exporter(config: TrackingConfig, run_dir: RunDir) -> TraceExporter | None:
    if not isinstance(config, MonitoringConfig) or not config.otlp_endpoint:
        return None
    resource_attributes = {"service.name": "vz_ray", "vz.run": run_dir.name}
    return TraceExporter(config.otlp_endpoint, config.trace_sample_ratio, resource_attributes)


def _close_sinks(monitor: RunMonitor) -> None:
    """Close the trace exporter and the trackers; each has its own timeout for pending records."""
    start = time.monotonic()
    exporters = (monitor.trace_exporter,) if monitor.trace_exporter else ()
    for sink in (*monitor.trackers, *exporters):
        with suppress(Exception):
            sink.close()
    dropped = {sink: count for sink, count in monitor.dropped_records().items() if count}
    if dropped:
        log.warning("Dropped records not sent within %.0f s: %s", time.monotonic() - start, dropped)


def prometheus_targets() -> list[str]:
    """Return `host:port` of the metrics agent of each alive node."""
    if not ray.is_initialized():
        return []
    nodes = (node for node in ray.nodes() if node["Alive"] and node.get("MetricsExportPort"))
    return sorted(f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes)
