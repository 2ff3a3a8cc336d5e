"""A watch over a run, with everything that is configured for whoever looks on."""

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
from vz_ray.monitoring.live_status import RL_RUN, RunState
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
    """Trackers by their keys; empty for those that are not configured."""
    return {"wandb_project": config.wandb_project, "mlflow_uri": config.mlflow_tracking_uri}


def check_monitoring(config: TrackingConfig) -> None:
    """`UserError` if something is configured whose package is not installed; said before anything starts."""
    check_trackers_installed(configured_trackers(config))
    if isinstance(config, MonitoringConfig) and config.otlp_endpoint:
        TraceExporter(config.otlp_endpoint, 0.0, {}).close()


@asynccontextmanager
async def monitor_run(
    config: TrackingConfig,
    run: RunDir,
    pool: DecodePool,
    rollout: RolloutScheduler | None = None,
    *,
    run_kind: str = RL_RUN,
    metrics_file: str = "metrics.jsonl",
) -> AsyncIterator[RunMonitor]:
    """A watch that tells Ray, `live.json`, traces and trackers; the last word is said as the block ends.

    Args:
        rollout: The rollout workers, where the run has some.
        run_kind, rows: See `RunMonitor`.

    Raises:
        UserError: A tracker or the exporter of traces cannot be had. Whatever goes wrong with them
            later is logged and counted.
    """
    settings = await asyncio.to_thread(flatten_config, run.config)
    trackers = await asyncio.to_thread(open_trackers, configured_trackers(config), run, settings)
    watch = RunMonitor(
        run.name,
        RayMetrics(run.name),
        _traces(config, run),
        trackers,
        run_kind=run_kind,
        metrics_file=metrics_file,
    )
    heart = Heartbeat(watch, run, rollout, pool, config.poll_interval_s, prometheus_targets)
    if rollout is not None:
        rollout.on_accepted = watch.on_episode
    beating = asyncio.create_task(heart.run())
    log.info("process %d tells how %s is: metrics are at %s", os.getpid(), run.path, prometheus_targets())
    state, error = RunState.FAILED, ""
    try:
        yield watch
        state = RunState.ENDED
    except (StopRequested, asyncio.CancelledError, KeyboardInterrupt):
        state = RunState.STOPPED
        raise
    except BaseException as ended:
        error = f"{type(ended).__name__}: {ended}"
        raise
    finally:
        if rollout is not None:
            rollout.on_accepted = lambda _: None
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
        await heart.finish(state, error)
        await asyncio.to_thread(_close, watch)


def _traces(config: TrackingConfig, run: RunDir) -> TraceExporter | None:
    if not isinstance(config, MonitoringConfig) or not config.otlp_endpoint:
        return None
    about = {"service.name": "vz_ray", "vz.run": run.name}
    return TraceExporter(config.otlp_endpoint, config.trace_sample_ratio, about)


def _close(watch: RunMonitor) -> None:
    """Ends traces and trackers; each has a time of its own for what has not been sent."""
    began = time.monotonic()
    for sink in (*watch.trackers, *((watch.trace_exporter,) if watch.trace_exporter else ())):
        with suppress(Exception):
            sink.close()
    lost = {who: count for who, count in watch.dropped_records().items() if count}
    if lost:
        log.warning("not sent within %.0f s, and dropped: %s", time.monotonic() - began, lost)


def prometheus_targets() -> list[str]:
    """`host:port` of the metrics agent of each node that lives."""
    if not ray.is_initialized():
        return []
    alive = (node for node in ray.nodes() if node["Alive"] and node.get("MetricsExportPort"))
    return sorted(f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in alive)
