"""Quickstart: the whole pipeline on the needle world.

    synth -> cold start -> evaluate -> RL -> evaluate
                  |-> continued SFT for the duration of RL -> evaluate
    base -> uniform baseline, same questions, no tool      -> evaluate run 8 .. 128 frames
    -> summary.json, report.html

Each stage writes its output atomically. A resumed run skips stages with existing output.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from vz_ray.config import load_config
from vz_ray.config.quickstart import QuickstartConfig
from vz_ray.config.sft import SftConfig
from vz_ray.data.chat_format_loader import load_chat_format
from vz_ray.data.episode_record import read_records
from vz_ray.data.task_file import check_videos, read_tasks
from vz_ray.decode import DecodePool
from vz_ray.env.trajectory import Trajectory
from vz_ray.eval.checkpoint_evaluator import CheckpointEvaluator, baseline_episode_config
from vz_ray.eval.run_summary import COLD_START, RL, SFT_CONTINUED, write_summary
from vz_ray.eval.summary_tables import print_summary
from vz_ray.families import load_family
from vz_ray.learner.sft import SftState
from vz_ray.monitoring.run_dir import RunDir, stage_seconds
from vz_ray.needle.base_training import BaseTrainingConfig, build_base_model
from vz_ray.needle.exemplars import collect_exemplars, uniform_oracle_factory, zoom_oracle_factory
from vz_ray.needle.synthesis import synthesize
from vz_ray.report import write_report
from vz_ray.rewards import check_scorers
from vz_ray.runtime import ray_cluster, runtime
from vz_ray.runtime.run_context import RunContext, open_run
from vz_ray.training.run import run_rl_stage, start_rollout
from vz_ray.training.sft import run_sft_stage
from vz_ray.utils.errors import UserError
from vz_ray.video.local_source import LocalFrameSource

BASELINE = "baseline"


def run_quickstart(config: QuickstartConfig) -> None:
    """Run `vz-ray quickstart`."""
    check_scorers(config.reward, (), "the needle world")
    prepare_base(config)
    with open_run(config) as run:
        report = run.run_dir.path / "report.html"
        if not report.exists():
            make_needle_dataset(config, run)
            asyncio.run(_run_stages(config, run))
            write_summary(run.run_dir.path, config.eval)
            with run.time_stage("report"):
                write_report(run.run_dir.path, config.report, decoder=config.clips.decoder)
        summary = write_summary(run.run_dir.path, config.eval)
    print_summary(summary)
    print(f"report: {report}")


def prepare_base(config: QuickstartConfig) -> None:
    """Train the base model of the config's family if `model` is missing.

    Raises:
        UserError: `model` is of another family.
    """
    base = Path(config.model)
    if not base.exists():
        build_base_model(base, BaseTrainingConfig.for_family(config.family), threads=os.cpu_count() or 1)
    family = load_family(base)
    if family.model_type != config.family:
        raise UserError(
            f"family is {config.family}, but model {config.model} is {family.name}; set family={family.model_type}"
        )


def run_baseline(quickstart_dir: Path) -> None:
    """Run `vz-ray baseline`: train the uniform baseline on as many samples as the agent of `quickstart_dir`.

    Writes to a separate run directory, `<run>-baseline`.
    """
    agent_config = load_config(QuickstartConfig, RunDir.open(quickstart_dir).config)
    logs = sorted((quickstart_dir / "episodes").glob("*.jsonl"))
    num_episodes = sum(1 for path in logs for _ in read_records(path))
    samples = agent_config.cold_start.max_steps * agent_config.cold_start.batch_size + num_episodes
    steps = -(-samples // agent_config.baseline_sft.batch_size)
    config = replace(
        agent_config,
        name=f"{agent_config.name}-baseline",
        baseline_sft=replace(agent_config.baseline_sft, max_steps=steps, max_time_s=0.0),
    )
    with open_run(config) as run:
        run.progress.print_line(f"{samples} samples, as many as the agent in {quickstart_dir}: {steps} steps")
        asyncio.run(_train_and_evaluate_baseline(config, run))
        summary = write_summary(run.run_dir.path, config.eval)
    print_summary(summary)


async def _train_and_evaluate_baseline(config: QuickstartConfig, run: RunContext) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(ray_cluster.checked_ray_cluster(config))
        frames = await stack.enter_async_context(runtime.decode_pool(config))
        if not run.model_dir(BASELINE).exists():
            with run.time_stage(BASELINE):
                answers = await collect_uniform_exemplars(config)
                base = Path(config.model)
                await train_sft_model(config, run, frames, BASELINE, base, answers, config.baseline_sft)
        scheduler = await start_rollout(config, run, frames, stack)
        await CheckpointEvaluator(config, run, scheduler).evaluate_baseline(run.model_dir(BASELINE))


def make_needle_dataset(config: QuickstartConfig, run: RunContext) -> None:
    """Synthesize the missing needle videos and check the task files."""
    total = sum(config.synth.videos.values())
    with run.time_stage("synth"), run.progress.stage("synth", total) as stage:
        synthesize(config.synth, stage.advance)
    for path in (config.data.train, config.data.sft, config.data.test):
        check_videos(read_tasks(path), path)


async def _run_stages(config: QuickstartConfig, run: RunContext) -> None:
    async with AsyncExitStack() as stack:
        with run.time_stage("start Ray"):
            await stack.enter_async_context(ray_cluster.checked_ray_cluster(config))
            frames = await stack.enter_async_context(runtime.decode_pool(config))
        # The engines start in the background while the cold start trains.
        rollout_start = asyncio.create_task(start_rollout(config, run, frames, stack))
        try:
            cold_start_model = await run_cold_start(config, run, frames)
        except BaseException:
            rollout_start.cancel()
            await asyncio.gather(rollout_start, return_exceptions=True)
            raise
        with run.time_stage("start engine"), run.progress.stage("start engine", 1) as stage:
            scheduler = await rollout_start
            stage.advance()
        evaluator = CheckpointEvaluator(config, run, scheduler)
        await evaluator.evaluate_agent(COLD_START, cold_start_model)
        rl_model = await run_rl_stage(config, run, cold_start_model, frames, scheduler, RL)
        await evaluator.evaluate_agent(RL, rl_model)
        await train_controls(config, run, frames, cold_start_model)
        await evaluator.evaluate_agent(SFT_CONTINUED, run.model_dir(SFT_CONTINUED))
        await evaluator.evaluate_baseline(run.model_dir(BASELINE))


async def run_cold_start(config: QuickstartConfig, run: RunContext, frames: DecodePool) -> Path:
    """Train the base model on exemplars of the tool protocol; return the checkpoint directory."""
    model_dir = run.model_dir(COLD_START)
    if not model_dir.exists():
        with run.time_stage("cold start"):
            exemplars = await collect_cold_start_exemplars(config, frames)
            await train_sft_model(config, run, frames, COLD_START, Path(config.model), exemplars, config.cold_start)
    return model_dir


async def collect_cold_start_exemplars(config: QuickstartConfig, pool: DecodePool) -> list[Trajectory]:
    """Run the oracle on the SFT tasks."""
    tasks = read_tasks(config.data.sft)
    chat_format = load_chat_format(config.model, config.episode)
    ranker = await runtime.load_image_text_ranker(config.episode.selector, pool)
    with LocalFrameSource(decoder=config.clips.decoder) as local:
        make_policy = zoom_oracle_factory(chat_format, config.sparse_zoom_share, config.seed)
        return await collect_exemplars(tasks, local, chat_format, config.episode, make_policy, ranker)


async def collect_uniform_exemplars(config: QuickstartConfig) -> list[Trajectory]:
    """Run the uniform oracle on all training videos of the agent, for each frame count."""
    tasks = [*read_tasks(config.data.sft), *read_tasks(config.data.train)]
    counts = config.baseline.train_frames
    trajectories: list[Trajectory] = []
    with LocalFrameSource(decoder=config.clips.decoder) as local:
        for count in counts:
            episode = baseline_episode_config(config, count)
            chat_format = load_chat_format(config.model, episode)
            trajectories += await collect_exemplars(
                tasks, local, chat_format, episode, uniform_oracle_factory(chat_format)
            )
    return trajectories


async def train_sft_model(
    config: QuickstartConfig,
    run: RunContext,
    frames: DecodePool,
    stage: str,
    start: Path,
    trajectories: list[Trajectory],
    sft_config: SftConfig,
) -> SftState:
    """Train checkpoint `start` on the trajectories and export it as the model of `stage`."""
    learner = replace(config.sft_learner, model=str(start))
    return await run_sft_stage(learner, config.ray, run, frames, stage, trajectories, sft_config, config.seed)


async def train_controls(config: QuickstartConfig, run: RunContext, frames: DecodePool, cold_start_model: Path) -> None:
    """Train the controls of RL concurrently: SFT for the duration of RL, and the uniform baseline."""
    rl_seconds = stage_seconds(run.run_dir.path)["rl"]
    trainings = []
    if not run.model_dir(SFT_CONTINUED).exists():
        sft_config = replace(config.sft_continued, max_time_s=rl_seconds)
        exemplars = await collect_cold_start_exemplars(config, frames)
        trainings.append(train_sft_model(config, run, frames, SFT_CONTINUED, cold_start_model, exemplars, sft_config))
    if not run.model_dir(BASELINE).exists():
        answers = await collect_uniform_exemplars(config)
        base = Path(config.model)
        trainings.append(train_sft_model(config, run, frames, BASELINE, base, answers, config.baseline_sft))
    with run.time_stage("controls"):
        await asyncio.gather(*trainings)
