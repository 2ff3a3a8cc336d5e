"""A watch over a run, with everything that is configured for whoever looks on."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import ray

from vz_ray.clips import ClipPool
from vz_ray.config.observe import ObserveConfig, WatchConfig
from vz_ray.instruments import Instruments
from vz_ray.observe.interrupt import StopRequested
from vz_ray.observe.live import ITERATION, State
from vz_ray.observe.run_dir import RunDir
from vz_ray.observe.traces import Traces
from vz_ray.observe.trackers import check_trackers, open_trackers, settings_of
from vz_ray.rollout.fleet import Fleet
from vz_ray.watch.heartbeat import Heartbeat
from vz_ray.watch.watch import Watch

log = logging.getLogger(__name__)


def wanted_trackers(config: WatchConfig) -> dict[str, str]:
    """Trackers by their keys; empty for those that are not configured."""
    return {"wandb_project": config.wandb_project, "mlflow_uri": config.mlflow_uri}


def check_observers(config: WatchConfig) -> None:
    """`UserError` if something is configured whose package is not installed; said before anything starts."""
    check_trackers(wanted_trackers(config))
    if isinstance(config, ObserveConfig) and config.otlp_endpoint:
        Traces(config.otlp_endpoint, 0.0, {}).close()


@asynccontextmanager
async def watching(
    config: WatchConfig,
    run: RunDir,
    pool: ClipPool,
    fleet: Fleet | None = None,
    *,
    unit: str = ITERATION,
    rows: str = "metrics.jsonl",
) -> AsyncIterator[Watch]:
    """A watch that tells Ray, `live.json`, traces and trackers; the last word is said as the block ends.

    Args:
        fleet: The rollout workers, where the run has some.
        unit, rows: See `Watch`.

    Raises:
        UserError: A tracker or the exporter of traces cannot be had. Whatever goes wrong with them
            later is logged and counted.
    """
    settings = await asyncio.to_thread(settings_of, run.config)
    trackers = await asyncio.to_thread(open_trackers, wanted_trackers(config), run, settings)
    watch = Watch(run.name, Instruments(run.name), _traces(config, run), trackers, unit=unit, rows=rows)
    heart = Heartbeat(watch, run, fleet, pool, config.pulse_s, scrape_targets)
    if fleet is not None:
        fleet.accepted = watch.accepted
    beating = asyncio.create_task(heart.beat_on())
    log.info("process %d tells how %s is: metrics are at %s", os.getpid(), run.path, scrape_targets())
    state, error = State.FAILED, ""
    try:
        yield watch
        state = State.ENDED
    except (StopRequested, asyncio.CancelledError, KeyboardInterrupt):
        state = State.STOPPED
        raise
    except BaseException as ended:
        error = f"{type(ended).__name__}: {ended}"
        raise
    finally:
        if fleet is not None:
            fleet.accepted = lambda _: None
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
        await heart.end(state, error)
        await asyncio.to_thread(_close, watch)


def _traces(config: WatchConfig, run: RunDir) -> Traces | None:
    if not isinstance(config, ObserveConfig) or not config.otlp_endpoint:
        return None
    about = {"service.name": "vz_ray", "vz.run": run.name}
    return Traces(config.otlp_endpoint, config.trace_share, about)


def _close(watch: Watch) -> None:
    """Ends traces and trackers; each has a time of its own for what has not been sent."""
    began = time.monotonic()
    for sink in (*watch.trackers, *((watch.traces,) if watch.traces else ())):
        with suppress(Exception):
            sink.close()
    lost = {who: count for who, count in watch.dropped().items() if count}
    if lost:
        log.warning("not sent within %.0f s, and dropped: %s", time.monotonic() - began, lost)


def scrape_targets() -> list[str]:
    """`host:port` of the metrics agent of each node that lives."""
    if not ray.is_initialized():
        return []
    alive = (node for node in ray.nodes() if node["Alive"] and node.get("MetricsExportPort"))
    return sorted(f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in alive)
