"""Every stage from nothing to a report, each resumable.

    synth -> cold start -> evaluate -> RL -> evaluate
                  |-> cold start continued by SFT, as long as RL took -> evaluate
    base -> uniform baseline, same questions, no tool                 -> evaluate at 8 .. 128 frames
    -> summary.json, report.html

What a stage makes is there whole or not at all, and a stage whose product is
there is not run again.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from vz_ray.config import load_config
from vz_ray.config.quickstart import QuickstartConfig
from vz_ray.config.sft import SftConfig
from vz_ray.data.episode_record import read_records
from vz_ray.data.sft_data import load_chat_format
from vz_ray.data.task_file import check_videos, read_tasks
from vz_ray.decode import DecodePool
from vz_ray.env.trajectory import Trajectory
from vz_ray.eval.checkpoint_evaluator import CheckpointEvaluator, baseline_episode_config
from vz_ray.eval.run_summary import COLD_START, RL, SFT_CONTINUED, write_summary
from vz_ray.eval.summary_tables import print_summary
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.monitoring.stage_times import stage_seconds
from vz_ray.needle.exemplars import collect_exemplars, uniform_oracle_factory, zoom_oracle_factory
from vz_ray.needle.synthesis import synthesize
from vz_ray.report import write_report
from vz_ray.rewards import check_scorers
from vz_ray.runtime import runtime
from vz_ray.runtime.run_context import RunContext, open_run
from vz_ray.training.run import run_rl_stage, start_rollout
from vz_ray.training.sft import run_sft_stage
from vz_ray.training.sft_loop import SftState
from vz_ray.video.local_source import LocalFrameSource

BASELINE = "baseline"


def run_quickstart(config: QuickstartConfig) -> None:
    """`vz-ray quickstart`."""
    check_scorers(config.reward, (), "the needle world")
    with open_run(config) as at:
        report = at.run_dir.path / "report.html"
        if not report.exists():
            make_needle_dataset(config, at)
            asyncio.run(_stages(config, at))
            write_summary(at.run_dir.path, config.eval)
            with at.time_stage("report"):
                write_report(at.run_dir.path, config.report, decoder=config.clips.decoder)
        summary = write_summary(at.run_dir.path, config.eval)
    print_summary(summary)
    print(f"report: {report}")


def run_baseline(run: Path) -> None:
    """`vz-ray baseline`: the uniform baseline trained on as many samples as the agent of `run` saw.

    Its figures go to a run of its own, `<run>-baseline`.
    """
    of = load_config(QuickstartConfig, RunDir.open(run).config)
    played = sum(1 for path in sorted((run / "episodes").glob("*.jsonl")) for _ in read_records(path))
    seen = of.cold_start.max_steps * of.cold_start.batch_size + played
    steps = -(-seen // of.baseline_sft.batch_size)
    config = replace(
        of, name=f"{of.name}-baseline", baseline_sft=replace(of.baseline_sft, max_steps=steps, max_time_s=0.0)
    )
    with open_run(config) as at:
        at.progress.print_line(f"{seen} samples, as many as the agent of {run} saw: {steps} steps")
        asyncio.run(_baseline(config, at))
        summary = write_summary(at.run_dir.path, config.eval)
    print_summary(summary)


async def _baseline(config: QuickstartConfig, at: RunContext) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(runtime.checked_ray_cluster(config))
        frames = await stack.enter_async_context(runtime.decode_pool(config))
        if not at.model_dir(BASELINE).exists():
            with at.time_stage(BASELINE):
                answers = await collect_uniform_exemplars(config)
                base = Path(config.model)
                await train_sft_model(config, at, frames, BASELINE, base, answers, config.baseline_sft)
        fleet = await start_rollout(config, at, frames, stack)
        await CheckpointEvaluator(config, at, fleet).evaluate_baseline(at.model_dir(BASELINE))


def make_needle_dataset(config: QuickstartConfig, at: RunContext) -> None:
    """Makes the needle videos that are missing."""
    total = sum(config.synth.videos.values())
    with at.time_stage("synth"), at.progress.stage("synth", total) as stage:
        synthesize(config.synth, stage.advance)
    for path in (config.data.train, config.data.sft, config.data.test):
        check_videos(read_tasks(path), path)


async def _stages(config: QuickstartConfig, at: RunContext) -> None:
    async with AsyncExitStack() as stack:
        with at.time_stage("start Ray"):
            await stack.enter_async_context(runtime.checked_ray_cluster(config))
            frames = await stack.enter_async_context(runtime.decode_pool(config))
        # An engine takes half a minute to start, most of it on one core: time to train the cold start.
        starting = asyncio.create_task(start_rollout(config, at, frames, stack))
        try:
            cold = await run_cold_start(config, at, frames)
        except BaseException:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            raise
        with at.time_stage("start engine"), at.progress.stage("start engine", 1) as stage:
            fleet = await starting
            stage.advance()
        examine = CheckpointEvaluator(config, at, fleet)
        await examine.evaluate_agent(COLD_START, cold)
        trained = await run_rl_stage(config, at, cold, frames, fleet, RL)
        await examine.evaluate_agent(RL, trained)
        await train_controls(config, at, frames, cold)
        await examine.evaluate_agent(SFT_CONTINUED, at.model_dir(SFT_CONTINUED))
        await examine.evaluate_baseline(at.model_dir(BASELINE))


async def run_cold_start(config: QuickstartConfig, at: RunContext, frames: DecodePool) -> Path:
    """The base taught the protocol by a few exemplars; returns its checkpoint directory."""
    out = at.model_dir(COLD_START)
    if not out.exists():
        with at.time_stage("cold start"):
            exemplars = await collect_cold_start_exemplars(config, frames)
            await train_sft_model(
                config, at, frames, COLD_START, Path(config.model), exemplars, config.cold_start
            )
    return out


async def collect_cold_start_exemplars(config: QuickstartConfig, pool: DecodePool) -> list[Trajectory]:
    tasks = read_tasks(config.data.sft)
    wire = load_chat_format(config.model, config.episode)
    ranker = await runtime.load_image_text_ranker(config.episode.selector, pool)
    with LocalFrameSource(decoder=config.clips.decoder) as local:
        expert = zoom_oracle_factory(wire, config.sparse_zoom_share, config.seed)
        return await collect_exemplars(tasks, local, wire, config.episode, expert, ranker)


async def collect_uniform_exemplars(config: QuickstartConfig) -> list[Trajectory]:
    """Answers from uniform frames, on all the videos that the agent trains on, each frame count in turn."""
    tasks = [*read_tasks(config.data.sft), *read_tasks(config.data.train)]
    counts = config.baseline.train_frames
    played: list[Trajectory] = []
    with LocalFrameSource(decoder=config.clips.decoder) as local:
        for count in counts:
            episode = baseline_episode_config(config, count)
            wire = load_chat_format(config.model, episode)
            played += await collect_exemplars(tasks, local, wire, episode, uniform_oracle_factory(wire))
    return played


async def train_sft_model(
    config: QuickstartConfig,
    at: RunContext,
    frames: DecodePool,
    stage: str,
    start: Path,
    trajectories: list[Trajectory],
    length: SftConfig,
) -> SftState:
    """Trains `start` on written turns and exports it as the model of `stage`."""
    learner = replace(config.sft_learner, model=str(start))
    return await run_sft_stage(learner, config.ray, at, frames, stage, trajectories, length, config.seed)


async def train_controls(config: QuickstartConfig, at: RunContext, frames: DecodePool, cold: Path) -> None:
    """What RL is compared with, trained side by side: SFT as long as RL took, and the baseline."""
    rl_seconds = stage_seconds(at.run_dir.path)["rl"]
    stages = []
    if not at.model_dir(SFT_CONTINUED).exists():
        length = replace(config.sft_continued, max_time_s=rl_seconds)
        exemplars = await collect_cold_start_exemplars(config, frames)
        stages.append(train_sft_model(config, at, frames, SFT_CONTINUED, cold, exemplars, length))
    if not at.model_dir(BASELINE).exists():
        answers = await collect_uniform_exemplars(config)
        base = Path(config.model)
        stages.append(train_sft_model(config, at, frames, BASELINE, base, answers, config.baseline_sft))
    with at.time_stage("controls"):
        await asyncio.gather(*stages)
