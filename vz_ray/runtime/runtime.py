"""The actors of a run: a Ray cluster, decoders, learner, rollout workers."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray

from vz_ray.config.distill import DistillRunConfig
from vz_ray.config.frame_selector import FrameSelectorConfig
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.run import GrpoRunConfig, RayConfig, RolloutRunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.decode import DecodePool, FrameRankerHandle
from vz_ray.jobs.preflight import preflight
from vz_ray.jobs.resource_demands import ClusterConfig
from vz_ray.learner import weight_transports
from vz_ray.learner.learner import Learner
from vz_ray.monitoring.checks import CheckResult, CheckStatus, require_checks
from vz_ray.monitoring.log_context import RunIdentity
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.rewards import score_episode
from vz_ray.rollout.ray_worker import RayWorkerClient
from vz_ray.rollout.rollout_scheduler import RolloutScheduler
from vz_ray.rollout.rollout_worker import WorkerSetup
from vz_ray.runtime.run_context import RunContext
from vz_ray.runtime.run_monitor import RunMonitor
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import restore_signal_handlers
from vz_ray.utils.temp_dir import temp_dir
from vz_ray.utils.timeouts import with_timeout
from vz_ray.weight_sync import ParityProbe, WeightPublisher, WeightTransport, build_parity_probe
from vz_ray.weight_sync.backends import gpu_fraction

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
"""How long a cluster that is to be joined may take to accept a connection."""
PROCESS_EXIT_TIMEOUT_S = 3.0
"""How long processes of a private cluster may take to end after it."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """What the training loop drives.

    Attributes:
        learner: Takes steps.
        scheduler: Plays episodes.
        transport: The learner's side of a publish.
        monitor: Is told what happens, for whoever looks on.
    """

    learner: Learner
    scheduler: RolloutScheduler
    transport: WeightTransport
    monitor: RunMonitor = field(default_factory=RunMonitor)


@asynccontextmanager
async def ray_cluster(config: RayConfig) -> AsyncIterator[None]:
    """Joins the cluster that `config` names, or starts a private one that ends with the block.

    Raises:
        UserError: It cannot be joined or started.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray would run its workers at the lowest priority, and here they are what does the work.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray's sockets lie in it, and their paths may not be longer than 107 characters.
    with nullcontext() if config.address else temp_dir("vz_ray_") as folder:
        try:
            await with_timeout(
                asyncio.to_thread(_init, config, folder),
                config.start_timeout_s,
                target="Ray",
                operation="its start",
            )
            restore_signal_handlers()
            yield
        finally:
            ours = _processes(folder)
            ray.shutdown()
            _end(ours)


def _processes(folder: Path | None) -> list[psutil.Process]:
    """The processes of the private cluster whose files lie in `folder`, and all that they have started."""
    if folder is None:
        return []
    started = psutil.Process().children()
    roots = [p for p in started if any(str(folder) in argument for argument in _command(p))]
    return [below for root in roots for below in [root, *_children(root)]]


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return list(process.cmdline())
    return []


def _children(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return list(process.children(recursive=True))
    return []


def _end(processes: list[psutil.Process]) -> None:
    """Waits for processes to end by themselves, and kills the rest: Ray's agents outlive it by a minute."""
    _, alive = psutil.wait_procs(processes, timeout=PROCESS_EXIT_TIMEOUT_S)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()


def _init(config: RayConfig, folder: Path | None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.address:
        _knock(config.address)
        options |= {"address": config.address}
    else:
        options |= {
            # Without it Ray would join whatever cluster it finds.
            "address": "local",
            "num_cpus": config.num_cpus,
            "object_store_memory": config.object_store_mib * 2**20,
            "include_dashboard": False,
            "_metrics_export_port": config.metrics_port or None,
            "_temp_dir": str(folder),
        }
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"join Ray at {config.address}" if config.address else "start Ray"
        raise UserError(
            f"cannot {where}: {str(error).strip().splitlines()[0]}; try `vz-ray doctor`"
        ) from error


def _knock(address: str) -> None:
    """`UserError` if nobody listens at `host:port`; Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not port.isdigit():
        return  # `auto`: Ray looks for one and says at once if there is none
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f"cannot join Ray at {address}: nobody answers there ({error.strerror or error}); "
            "check ray.address, or leave it empty for a cluster of the run's own"
        ) from error


def run_identity(config: ClusterConfig) -> RunIdentity:
    """What the actors of a run, or of a server, are given, to say whose they are."""
    return RunIdentity(config.name, config.monitoring.log_format)


@asynccontextmanager
async def checked_ray_cluster(config: ClusterConfig) -> AsyncIterator[None]:
    """`ray_cluster` for a run; one that was joined is looked over first.

    Raises:
        UserError: The run would not find room there, or not what it needs. See `jobs.preflight`.
    """
    async with ray_cluster(config.ray):
        if config.ray.address:
            checks = await preflight_checks(config)
            require_checks(*checks)
            for check in checks:
                log.log(
                    logging.INFO if check.status is CheckStatus.OK else logging.WARNING,
                    "%s: %s",
                    check.name,
                    check.detail,
                )
        yield


async def preflight_checks(config: ClusterConfig) -> list[CheckResult]:
    """What a run of `config` finds in the cluster that was joined."""
    share = gpu_fraction(config.weights.transport) if isinstance(config, RolloutRunConfig) else 1.0
    return await preflight(config, gpus=use_gpus(config.ray), gpu_share=share)


@asynccontextmanager
async def decode_pool(
    config: RolloutRunConfig | SftRunConfig | DistillRunConfig,
) -> AsyncIterator[DecodePool]:
    """The decoders; they end with the block."""
    pool = DecodePool.start(config.clips, run_identity(config))
    try:
        await pool.wait_until_ready()
        yield pool
    finally:
        pool.close()


@asynccontextmanager
async def start_learner(
    config: LearnerConfig,
    ray_config: RayConfig,
    decode_pool: DecodePool,
    run: RunContext,
    *,
    gpu_share: float = 1.0,
) -> AsyncIterator[Learner]:
    """A learner with its model loaded; it ends with the block.

    Args:
        run: Of the run that it learns for, in whose `logs/` its ranks write.
        gpu_share: What a rank has of a GPU.
    """
    gpus = gpu_share if use_gpus(ray_config) else 0.0
    group = await Learner.start(
        config,
        decode_pool,
        gpus_per_rank=gpus,
        identity=run.run_identity,
        log_dir=str(run.run_dir.logs.resolve()),
    )
    try:
        yield group
    finally:
        group.close()


async def load_image_text_ranker(config: FrameSelectorConfig, frames: DecodePool) -> FrameRankerHandle | None:
    """The image-text model, loaded, where overviews are chosen with one; it ends with its last handle."""
    if config.kind != "query":
        return None
    ranking = FrameRankerHandle.start(config, frames)
    await ranking.wait_until_ready()
    return ranking


@asynccontextmanager
async def start_rollout(
    config: RolloutRunConfig, model: Path | str, decode_pool: DecodePool, run_dir: RunDir
) -> AsyncIterator[RolloutScheduler]:
    """Rollout workers that hold `model` as weight version 0; they end with the block."""
    setup = WorkerSetup(
        model=str(model),
        rollout=config.rollout,
        episode=config.episode,
        reward=config.reward,
        frame_source=decode_pool,
        scorer=score_episode,
        log_dir=str(run_dir.logs.resolve()),
        transport=config.weights.transport,
        ranker=await load_image_text_ranker(config.episode.selector, decode_pool),
        badge=run_identity(config),
    )
    publisher = WeightPublisher(
        timeout_s=config.weights.timeout_s,
        probe=parity_probe(model),
        tolerance=config.weights.probe_tolerance,
        probe_every=config.weights.probe_every,
    )
    # Once for the whole run: while all nodes with GPUs are away, the cluster has none.
    gpus = use_gpus(config.ray)
    workers = RolloutScheduler(
        lambda name: RayWorkerClient(name, setup, gpus=gpus), config.rollout, publisher
    )
    try:
        await workers.start()
        yield workers
    finally:
        await workers.close()


@asynccontextmanager
async def weight_store_dir(config: GrpoRunConfig) -> AsyncIterator[Path]:
    """Where published versions lie: shared memory, given back with the block."""
    if config.weights.shm_dir:
        yield Path(config.weights.shm_dir)
        return
    with temp_dir("vz_ray_weights_", Path("/dev/shm")) as folder:
        yield folder


def parity_probe(model: Path | str) -> ParityProbe:
    """What engines and learner are compared on after a publish."""
    from transformers import AutoTokenizer

    return build_parity_probe(AutoTokenizer.from_pretrained(str(model), trust_remote_code=False))


def weight_transport(
    group: Learner, config: GrpoRunConfig, store: Path, model: Path | str
) -> WeightTransport:
    """The learner's side of a publish."""
    parallel = config.rollout.engine.tensor_parallel_size
    return weight_transports.create_weight_transport(
        group, config.weights, store, parity_probe(model), parallel
    )


def use_gpus(config: RayConfig) -> bool:
    """Whether engines and learner ranks get GPUs in the cluster that was joined."""
    if config.use_gpus == "auto":
        return bool(ray.cluster_resources().get("GPU"))
    return config.use_gpus == "always"
