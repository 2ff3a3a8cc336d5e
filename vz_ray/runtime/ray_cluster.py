"""Start or join a Ray cluster, and run the pre-flight checks."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import ray

from vz_ray.config.ray import RayConfig
from vz_ray.config.run import RolloutRunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.jobs.preflight import preflight
from vz_ray.jobs.resource_demands import ClusterConfig
from vz_ray.monitoring.checks import CheckResult, CheckStatus, require_checks
from vz_ray.runtime.run_timeouts import set_timeouts
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import restore_signal_handlers
from vz_ray.utils.ports import check_ray_connection
from vz_ray.utils.temp_dir import temp_dir
from vz_ray.utils.timeouts import with_timeout

log = logging.getLogger(__name__)

PROCESS_EXIT_TIMEOUT_S = 3.0
"""Seconds that the processes of a private cluster have to exit before they are killed."""
_SLOW_START = "timed out during startup"
"""Part of Ray's message if its processes are not ready in time."""


@asynccontextmanager
async def checked_ray_cluster(config: ClusterConfig) -> AsyncIterator[None]:
    """Start or join the run's Ray cluster; run the pre-flight checks on an existing cluster.

    Timeouts that the config of a run leaves null are set in `config`, for the GPUs of the cluster.

    Raises:
        UserError: Ray cannot be started or joined, or a pre-flight check fails.
    """
    async with ray_cluster(config.ray):
        if config.ray.address:
            checks = await preflight_checks(config)
            require_checks(*checks)
            for check in checks:
                level = logging.INFO if check.status is CheckStatus.OK else logging.WARNING
                log.log(level, "%s: %s", check.name, check.detail)
        if isinstance(config, RolloutRunConfig | SftRunConfig):
            set_timeouts(config, gpus=use_gpus(config.ray), resources=ray.cluster_resources())
        yield


@asynccontextmanager
async def ray_cluster(config: RayConfig) -> AsyncIterator[None]:
    """Join the cluster at `config.address`, or start a private cluster and stop it on exit.

    Raises:
        UserError: Ray cannot be started or joined.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's default niceness of 15 would slow down the workers.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # A short path, because the paths of Ray's sockets are limited to 107 characters.
    with nullcontext() if config.address else temp_dir("vz_ray_") as directory:
        try:
            await with_timeout(
                asyncio.to_thread(_init_ray, config, directory),
                config.start_timeout_s,
                target="Ray",
                operation="its start",
            )
            restore_signal_handlers()
            yield
        finally:
            processes = _cluster_processes(directory)
            ray.shutdown()
            _end_processes(processes)


async def check_cluster(config: ClusterConfig) -> list[CheckResult]:
    """Connect to the cluster of `config` and return the results of the pre-flight checks."""
    async with ray_cluster(config.ray):
        return await preflight_checks(config)


async def preflight_checks(config: ClusterConfig) -> list[CheckResult]:
    """Return the results of the pre-flight checks for `config` on the connected cluster."""
    return await preflight(config, gpus=use_gpus(config.ray))


def use_gpus(config: RayConfig) -> bool:
    """Return whether engines and learner ranks use GPUs on the connected cluster."""
    if config.use_gpus == "auto":
        return bool(ray.cluster_resources().get("GPU"))
    return config.use_gpus == "always"


def _init_ray(config: RayConfig, directory: Path | None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.address:
        check_ray_connection(config.address, "correct ray.address, or leave it empty for a private cluster")
        options |= {"address": config.address}
    else:
        options |= {
            # Without "local", Ray would join any cluster on this machine.
            "address": "local",
            "num_cpus": config.num_cpus,
            "object_store_memory": config.object_store_mib * 2**20,
            "include_dashboard": False,
            "_metrics_export_port": config.metrics_port or None,
            "_temp_dir": str(directory),
        }
    try:
        init_ray(**options)
    except Exception as error:  # Ray raises `Exception` itself, too
        action = f"join Ray at {config.address}" if config.address else "start Ray"
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot {action}: {reason}; try `vz-ray doctor`") from error


def init_ray(**options: Any) -> None:
    """Call `ray.init`. Try once more if Ray's processes are not ready after 30 s, its fixed limit.

    Raises:
        Exception: Ray cannot be started or joined.
    """
    try:
        ray.init(**options)
    except Exception as error:
        if _SLOW_START not in str(error):
            raise
        log.warning("Ray did not start within 30 s, because the machine is busy; starting it again")
        ray.shutdown()
        ray.init(**options)


def _cluster_processes(directory: Path | None) -> list[psutil.Process]:
    """Return the processes of the private cluster in `directory`, including descendants."""
    if directory is None:
        return []
    children = psutil.Process().children()
    roots = [child for child in children if any(str(directory) in argument for argument in _cmdline(child))]
    return [process for root in roots for process in [root, *_descendants(root)]]


def _cmdline(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return list(process.cmdline())
    return []


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return list(process.children(recursive=True))
    return []


def _end_processes(processes: list[psutil.Process]) -> None:
    """Wait for processes to exit, then kill the rest: Ray's agents outlive the cluster by a minute."""
    _, alive = psutil.wait_procs(processes, timeout=PROCESS_EXIT_TIMEOUT_S)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
