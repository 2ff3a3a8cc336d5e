"""Assemble the Ray actors of a run: decode pool, learner, rollout workers, weight transport."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from vz_ray.config.distill import DistillRunConfig
from vz_ray.config.fields import InvalidValueError
from vz_ray.config.frame_selector import FrameSelectorConfig
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.ray import RayConfig
from vz_ray.config.run import GrpoRunConfig, RolloutRunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.config.teacher import check_shared_tokens
from vz_ray.decode import DecodePool, FrameRankerHandle
from vz_ray.jobs.resource_demands import ClusterConfig
from vz_ray.learner.learner import Learner
from vz_ray.learner.placement import LearnerPlacement
from vz_ray.monitoring.log_context import RunIdentity
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.rewards import score_episode
from vz_ray.rollout.engine_args import check_engine_options
from vz_ray.rollout.ray_worker import RayWorkerClient
from vz_ray.rollout.rollout_scheduler import RolloutScheduler
from vz_ray.rollout.rollout_worker import WorkerSetup
from vz_ray.rollout.teacher_scorer import TeacherScorer
from vz_ray.rollout.teacher_worker import TeacherSetup, TeacherWorkerClient
from vz_ray.rollout.weight_copies import WeightCopies
from vz_ray.rollout.worker_bundles import WorkerBundles
from vz_ray.rollout.worker_pool import WorkerPool
from vz_ray.runtime.ray_cluster import use_gpus
from vz_ray.runtime.run_context import RunContext
from vz_ray.runtime.run_monitor import RunMonitor
from vz_ray.utils.errors import UserError
from vz_ray.utils.placement import node_group_resources
from vz_ray.utils.temp_dir import temp_dir
from vz_ray.weight_sync import ParityCheck, ParityProbe, WeightPublisher, WeightTransport, build_parity_probe

PARITY_FILE = "parity_probe.json"
"""Continuation and calibration of the parity probe, in the run directory."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """Actors that the training loop uses.

    Attributes:
        learner: Trains on groups.
        scheduler: Rolls out episodes.
        transport: Sends the learner's weights to the engines.
        monitor: Receives the progress of the loop.
        teacher: Scores groups; None without on-policy distillation.
    """

    learner: Learner
    scheduler: RolloutScheduler
    transport: WeightTransport
    monitor: RunMonitor = field(default_factory=RunMonitor)
    teacher: TeacherScorer | None = None


def run_identity(config: ClusterConfig) -> RunIdentity:
    """Return the run name and log format, which every actor of the run receives."""
    return RunIdentity(config.name, config.monitoring.log_format)


@asynccontextmanager
async def decode_pool(
    config: RolloutRunConfig | SftRunConfig | DistillRunConfig,
) -> AsyncIterator[DecodePool]:
    """Start the decode pool and wait until it is ready; close it on exit."""
    pool = DecodePool.start(config.clips, run_identity(config))
    try:
        await pool.wait_until_ready()
        yield pool
    finally:
        pool.close()


def learner_placement(config: LearnerConfig, ray_config: RayConfig) -> LearnerPlacement:
    """Describe the resources of a learner with its own GPUs."""
    return LearnerPlacement(config, gpus_per_rank=1.0 if use_gpus(ray_config) else 0.0)


def rl_placement(config: GrpoRunConfig) -> LearnerPlacement:
    """Describe the resources of the learner; if GPUs are shared, also of the rollout worker beside each rank."""
    gpus, rollout = use_gpus(config.ray), config.rollout
    workers = {
        "CPU": rollout.cpus_per_worker,
        "GPU": config.gpu_share * gpus,
        **node_group_resources(rollout.node_group),
    }
    return LearnerPlacement(
        config.learner,
        gpus_per_rank=config.gpu_share * gpus,
        worker_resources={name: n for name, n in workers.items() if n} if config.shares_gpus else None,
    )


@asynccontextmanager
async def start_learner(
    config: LearnerConfig, decode_pool: DecodePool, run: RunContext, placement: LearnerPlacement
) -> AsyncIterator[Learner]:
    """Start the learner actors and load the model; close them on exit.

    Args:
        run: Its `logs/` directory receives the logs of the ranks.
        placement: Resources of the ranks.
    """
    learner = await Learner.start(
        config,
        decode_pool,
        placement=placement,
        identity=run.run_identity,
        log_dir=str(run.run_dir.logs.resolve()),
    )
    try:
        yield learner
    finally:
        learner.close()


async def load_image_text_ranker(config: FrameSelectorConfig, decode_pool: DecodePool) -> FrameRankerHandle | None:
    """Load the image-text model if the frame selector needs it. The actor exits with its last handle."""
    if config.kind != "query":
        return None
    ranker = FrameRankerHandle.start(config, decode_pool)
    await ranker.wait_until_ready()
    return ranker


@asynccontextmanager
async def start_rollout(
    config: RolloutRunConfig,
    model: Path | str,
    decode_pool: DecodePool,
    run_dir: RunDir,
    placement: LearnerPlacement | None = None,
) -> AsyncIterator[RolloutScheduler]:
    """Start the rollout workers with `model` as weight version 0; close them on exit.

    Args:
        placement: Resources of the learner, which workers share if it has workers.

    Raises:
        UserError: An engine option is unknown to vLLM.
    """
    await asyncio.to_thread(check_engine_options, config.rollout.engine)
    setup = WorkerSetup(
        model=str(model),
        rollout=config.rollout,
        episode=config.episode,
        reward=config.reward,
        frame_source=decode_pool,
        scorer=score_episode,
        log_dir=str(run_dir.logs.resolve()),
        transport=config.weights.transport,
        gpu_share=config.gpu_share,
        colocate=isinstance(config, GrpoRunConfig) and config.train.colocate,
        ranker=await load_image_text_ranker(config.episode.selector, decode_pool),
        run_identity=run_identity(config),
    )
    publisher = WeightPublisher(
        timeout_s=config.weights.timeout_s,
        parity=ParityCheck(
            await asyncio.to_thread(_load_parity_probe, model),
            dtype=config.rollout.engine.dtype,
            max_gap=config.weights.probe_tolerance,
            file=run_dir.path / PARITY_FILE,
        ),
        probe_every=config.weights.probe_every,
    )
    # Resolved once per run: the cluster has no GPUs while all GPU nodes are preempted.
    gpus = use_gpus(config.ray)
    bundles = None
    if placement is not None and placement.has_workers:
        bundles = WorkerBundles(placement.reserve, config.rollout.num_workers)
    copies = WeightCopies()
    scheduler = RolloutScheduler(
        lambda name: RayWorkerClient(name, setup, gpus=gpus, bundles=bundles, copies=copies), config.rollout, publisher
    )
    try:
        await scheduler.pool.start()
        yield scheduler
    finally:
        await scheduler.pool.close()


@asynccontextmanager
async def start_teacher(
    config: GrpoRunConfig, student: Path | str, decode_pool: DecodePool, run_dir: RunDir
) -> AsyncIterator[TeacherScorer | None]:
    """Start the teacher workers of on-policy distillation; close them on exit. Yield None without a teacher.

    Args:
        student: Checkpoint directory of the student.

    Raises:
        UserError: Teacher and student have different tokens.
    """
    teacher = config.teacher
    if not teacher.enabled:
        yield None
        return
    try:
        await asyncio.to_thread(check_shared_tokens, student, teacher.model)
    except InvalidValueError as error:
        raise UserError(str(error)) from error
    setup = TeacherSetup(
        model=teacher.model,
        rollout=replace(teacher, engine=replace(teacher.engine, max_num_seqs=teacher.max_concurrent_episodes)),
        # The teacher selects no frames.
        episode=replace(config.episode, selector=FrameSelectorConfig()),
        reward=config.reward,
        frame_source=decode_pool,
        scorer=score_episode,
        log_dir=str(run_dir.logs.resolve()),
        run_identity=run_identity(config),
        temperature=config.train.temperature,
    )
    gpus = use_gpus(config.ray)
    pool = WorkerPool(
        lambda name: TeacherWorkerClient(name, setup, gpus=gpus),
        teacher,
        WeightPublisher(timeout_s=config.weights.timeout_s),
        kind="teacher",
    )
    try:
        await pool.start()
        yield TeacherScorer(pool, teacher)
    finally:
        await pool.close()


@asynccontextmanager
async def weight_store_dir(config: GrpoRunConfig) -> AsyncIterator[Path]:
    """Yield the directory of published weights: `weights.shm_dir`, or a temporary one in shared memory."""
    if config.weights.shm_dir:
        yield Path(config.weights.shm_dir)
        return
    with temp_dir("vz_ray_weights_", Path("/dev/shm")) as directory:
        yield directory


def _load_parity_probe(model: Path | str) -> ParityProbe:
    from transformers import AutoImageProcessor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
    return build_parity_probe(tokenizer, AutoImageProcessor.from_pretrained(str(model), trust_remote_code=False))
