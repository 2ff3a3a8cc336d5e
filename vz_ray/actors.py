"""The actors of a run: a Ray cluster, decoders, learner, rollout workers."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from vz_ray.clips import ClipPool
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.run import RayConfig, RunConfig
from vz_ray.learner.actor import LearnerGroup
from vz_ray.observe.deadline import within
from vz_ray.observe.errors import UserError
from vz_ray.observe.run_dir import RunDir
from vz_ray.reward import score
from vz_ray.rollout.fleet import Fleet
from vz_ray.rollout.remote import RayWorker
from vz_ray.rollout.worker import WorkerSetup
from vz_ray.weights import Probe, Publisher, Sender, build_probe


@dataclass(frozen=True, slots=True)
class Actors:
    """What the training loop drives.

    Attributes:
        learner: Takes steps.
        fleet: Plays episodes.
        sender: The learner's side of a publish.
    """

    learner: LearnerGroup
    fleet: Fleet
    sender: Sender


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
    folder = "" if config.address else tempfile.mkdtemp(prefix="vz_ray_")
    try:
        await within(
            config.start_deadline_s, asyncio.to_thread(_init, config, folder), who="Ray", what="its start"
        )
        yield
    finally:
        ray.shutdown()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _init(config: RayConfig, folder: str) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.address:
        options |= {"address": config.address}
    else:
        options |= {
            # Without it Ray would join whatever cluster it finds.
            "address": "local",
            "num_cpus": config.num_cpus,
            "object_store_memory": config.object_store_mib * 2**20,
            "include_dashboard": False,
            "_temp_dir": folder,
        }
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"join Ray at {config.address}" if config.address else "start Ray"
        raise UserError(
            f"cannot {where}: {str(error).strip().splitlines()[0]}; try `vz-ray doctor`"
        ) from error


@asynccontextmanager
async def clip_pool(config: RunConfig) -> AsyncIterator[ClipPool]:
    """The decoders; they end with the block."""
    pool = ClipPool.start(config.clips)
    try:
        await pool.ready()
        yield pool
    finally:
        pool.close()


@asynccontextmanager
async def learner(config: LearnerConfig, frames: ClipPool) -> AsyncIterator[LearnerGroup]:
    """A learner with its model loaded; it ends with the block."""
    group = await LearnerGroup.start(config, frames, gpus_per_rank=_gpus())
    try:
        yield group
    finally:
        group.close()


@asynccontextmanager
async def fleet(config: RunConfig, model: Path | str, frames: ClipPool, run: RunDir) -> AsyncIterator[Fleet]:
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
    )
    publisher = Publisher(
        deadline_s=config.weights.deadline_s,
        probe=probe_of(model),
        tolerance=config.weights.probe_tolerance,
        every=config.weights.probe_every,
    )
    workers = Fleet(lambda name: RayWorker(name, setup), config.rollout, publisher)
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
    folder = Path(tempfile.mkdtemp(prefix="vz_ray_weights_", dir="/dev/shm"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def probe_of(model: Path | str) -> Probe:
    """What engines and learner are compared on after a publish."""
    from transformers import AutoTokenizer

    return build_probe(AutoTokenizer.from_pretrained(str(model), trust_remote_code=False))


def sender_of(group: LearnerGroup, config: RunConfig, store: Path, model: Path | str) -> Sender:
    """The learner's side of a publish."""
    return group.sender(store, config.weights.bucket_mib * 2**20, probe_of(model))


def _gpus() -> float:
    """GPUs of each rank: one where the cluster has any."""
    return 1.0 if ray.cluster_resources().get("GPU") else 0.0
