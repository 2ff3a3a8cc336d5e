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

from vz_ray.clips import ClipPool, Ranking
from vz_ray.config.distill import DistillConfig
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.run import PlayConfig, RayConfig, RunConfig
from vz_ray.config.selector import SelectorConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.desk import Desk
from vz_ray.jobs.needs import ClusterConfig
from vz_ray.jobs.preflight import preflight
from vz_ray.learner import senders
from vz_ray.learner.actor import LearnerGroup
from vz_ray.observe.checks import Check, Verdict, require
from vz_ray.observe.deadline import within
from vz_ray.observe.errors import UserError
from vz_ray.observe.interrupt import take_back_signals
from vz_ray.observe.records import Badge
from vz_ray.observe.run_dir import RunDir
from vz_ray.observe.scratch import scratch
from vz_ray.reward import score
from vz_ray.rollout.fleet import Fleet
from vz_ray.rollout.remote import RayWorker
from vz_ray.rollout.worker import WorkerSetup
from vz_ray.watch.watch import Watch
from vz_ray.weights import Probe, Publisher, Sender, build_probe
from vz_ray.weights.backends import gpu_share

log = logging.getLogger(__name__)

KNOCK_S = 10.0
"""How long a cluster that is to be joined may take to accept a connection."""
END_S = 3.0
"""How long processes of a private cluster may take to end after it."""


@dataclass(frozen=True, slots=True)
class Actors:
    """What the training loop drives.

    Attributes:
        learner: Takes steps.
        fleet: Plays episodes.
        sender: The learner's side of a publish.
        watch: Is told what happens, for whoever looks on.
    """

    learner: LearnerGroup
    fleet: Fleet
    sender: Sender
    watch: Watch = field(default_factory=Watch)


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
    with nullcontext() if config.address else scratch("vz_ray_") as folder:
        try:
            await within(
                config.start_deadline_s, asyncio.to_thread(_init, config, folder), who="Ray", what="its start"
            )
            take_back_signals()
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
    _, alive = psutil.wait_procs(processes, timeout=END_S)
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
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()
    except OSError as error:
        raise UserError(
            f"cannot join Ray at {address}: nobody answers there ({error.strerror or error}); "
            "check ray.address, or leave it empty for a cluster of the run's own"
        ) from error


def badge_of(config: ClusterConfig) -> Badge:
    """What the actors of a run, or of a server, are given, to say whose they are."""
    return Badge(config.name, config.observe.log_format)


@asynccontextmanager
async def cluster_of(config: ClusterConfig) -> AsyncIterator[None]:
    """`ray_cluster` for a run; one that was joined is looked over first.

    Raises:
        UserError: The run would not find room there, or not what it needs. See `jobs.preflight`.
    """
    async with ray_cluster(config.ray):
        if config.ray.address:
            checks = await checks_of(config)
            require(*checks)
            for check in checks:
                log.log(
                    logging.INFO if check.verdict is Verdict.OK else logging.WARNING,
                    "%s: %s",
                    check.name,
                    check.found,
                )
        yield


async def checks_of(config: ClusterConfig) -> list[Check]:
    """What a run of `config` finds in the cluster that was joined."""
    share = gpu_share(config.weights.transport) if isinstance(config, PlayConfig) else 1.0
    return await preflight(config, gpus=on_gpus(config.ray), gpu_share=share)


@asynccontextmanager
async def clip_pool(config: PlayConfig | SftRunConfig | DistillConfig) -> AsyncIterator[ClipPool]:
    """The decoders; they end with the block."""
    pool = ClipPool.start(config.clips, badge_of(config))
    try:
        await pool.ready()
        yield pool
    finally:
        pool.close()


@asynccontextmanager
async def learner(
    config: LearnerConfig, ray_config: RayConfig, frames: ClipPool, at: Desk, *, gpu_share: float = 1.0
) -> AsyncIterator[LearnerGroup]:
    """A learner with its model loaded; it ends with the block.

    Args:
        at: Of the run that it learns for, in whose `logs/` its ranks write.
        gpu_share: What a rank has of a GPU.
    """
    gpus = gpu_share if on_gpus(ray_config) else 0.0
    group = await LearnerGroup.start(
        config, frames, gpus_per_rank=gpus, badge=at.badge, logs=str(at.run.logs.resolve())
    )
    try:
        yield group
    finally:
        group.close()


async def image_text(config: SelectorConfig, frames: ClipPool) -> Ranking | None:
    """The image-text model, loaded, where overviews are chosen with one; it ends with its last handle."""
    if config.kind != "query":
        return None
    ranking = Ranking.start(config, frames)
    await ranking.ready()
    return ranking


@asynccontextmanager
async def fleet(config: PlayConfig, model: Path | str, frames: ClipPool, run: RunDir) -> AsyncIterator[Fleet]:
    """Rollout workers that hold `model` as weight version 0; they end with the block."""
    setup = WorkerSetup(
        model=str(model),
        rollout=config.rollout,
        episode=config.episode,
        reward=config.reward,
        frames=frames,
        score=score,
        logs=str(run.logs.resolve()),
        transport=config.weights.transport,
        ranker=await image_text(config.episode.selector, frames),
        badge=badge_of(config),
    )
    publisher = Publisher(
        deadline_s=config.weights.deadline_s,
        probe=probe_of(model),
        tolerance=config.weights.probe_tolerance,
        every=config.weights.probe_every,
    )
    # Once for the whole run: while all nodes with GPUs are away, the cluster has none.
    gpus = on_gpus(config.ray)
    workers = Fleet(lambda name: RayWorker(name, setup, gpus=gpus), config.rollout, publisher)
    try:
        await workers.start()
        yield workers
    finally:
        await workers.close()


@asynccontextmanager
async def weight_store(config: RunConfig) -> AsyncIterator[Path]:
    """Where published versions lie: shared memory, given back with the block."""
    if config.weights.directory:
        yield Path(config.weights.directory)
        return
    with scratch("vz_ray_weights_", Path("/dev/shm")) as folder:
        yield folder


def probe_of(model: Path | str) -> Probe:
    """What engines and learner are compared on after a publish."""
    from transformers import AutoTokenizer

    return build_probe(AutoTokenizer.from_pretrained(str(model), trust_remote_code=False))


def sender_of(group: LearnerGroup, config: RunConfig, store: Path, model: Path | str) -> Sender:
    """The learner's side of a publish."""
    parallel = config.rollout.engine.tensor_parallel
    return senders.sender_of(group, config.weights, store, probe_of(model), parallel)


def on_gpus(config: RayConfig) -> bool:
    """Whether engines and learner ranks get GPUs in the cluster that was joined."""
    if config.gpus == "auto":
        return bool(ray.cluster_resources().get("GPU"))
    return config.gpus == "always"
