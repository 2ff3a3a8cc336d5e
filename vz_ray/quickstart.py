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

from vz_ray import actors
from vz_ray.actors import Actors
from vz_ray.clips import ClipPool
from vz_ray.coldstart.exemplars import answering, play_exemplars, zooming
from vz_ray.coldstart.sft import SftState
from vz_ray.config import load
from vz_ray.config.coldstart import SftConfig
from vz_ray.config.quickstart import QuickstartConfig
from vz_ray.config.run import RunConfig
from vz_ray.data.needle.synth import synthesize
from vz_ray.data.record import read_records
from vz_ray.data.rl_file import check_videos, read_tasks
from vz_ray.data.sft_source import wire_of
from vz_ray.desk import Desk, desk
from vz_ray.episode.trajectory import Trajectory
from vz_ray.evaluate.summary import (
    COLD_START,
    RL,
    SFT_CONTINUED,
    stage_seconds,
    write_summary,
)
from vz_ray.evaluate.tables import print_summary
from vz_ray.examiner import Examiner, uniform_episode
from vz_ray.observe.run_dir import RunDir
from vz_ray.report import write_report
from vz_ray.restarts import restarting
from vz_ray.reward import require_scorers
from vz_ray.rollout.fleet import Fleet
from vz_ray.supervised import teach
from vz_ray.train import train
from vz_ray.video.local import LocalFrames
from vz_ray.watch.watching import watching
from vz_ray.weights.backends import gpu_share

BASELINE = "baseline"


def run_training(config: RunConfig) -> None:
    """`vz-ray train`: the loop alone, from `config.model`, and its export."""
    watched = [config.data.validation] if config.train.evaluate_every else []
    for path in [config.data.train, *watched]:
        tasks = read_tasks(path)
        check_videos(tasks, path)
        require_scorers(config.reward, tasks, path)
    with desk(config) as at:
        asyncio.run(_training(config, at))


async def _training(config: RunConfig, at: Desk) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(actors.cluster_of(config))
        frames = await stack.enter_async_context(actors.clip_pool(config))
        fleet = await start_fleet(config, at, frames, stack)
        await reinforce(config, at, config.model, frames, fleet, "policy")
    at.progress.say(f"the policy is in {at.model('policy')}")


async def start_fleet(config: RunConfig, at: Desk, frames: ClipPool, stack: AsyncExitStack) -> Fleet:
    """Starts the engines; a stop need not wait for them."""
    return await at.interrupt.watch(
        stack.enter_async_context(actors.fleet(config, config.model, frames, at.run))
    )


def run_quickstart(config: QuickstartConfig) -> None:
    """`vz-ray quickstart`."""
    require_scorers(config.reward, (), "the needle world")
    with desk(config) as at:
        report = at.run.path / "report.html"
        if not report.exists():
            make_world(config, at)
            asyncio.run(_stages(config, at))
            write_summary(at.run.path, config.evaluate)
            with at.timed("report"):
                write_report(at.run.path, config.report, decoder=config.clips.decoder)
        summary = write_summary(at.run.path, config.evaluate)
    print_summary(summary)
    print(f"report: {report}")


def run_baseline(run: Path) -> None:
    """`vz-ray baseline`: the uniform baseline trained on as many samples as the agent of `run` saw.

    Its figures go to a run of its own, `<run>-baseline`.
    """
    of = load(QuickstartConfig, RunDir.open(run).config)
    played = sum(1 for path in sorted((run / "episodes").glob("*.jsonl")) for _ in read_records(path))
    seen = of.cold_start.steps * of.cold_start.batch + played
    steps = -(-seen // of.baseline_sft.batch)
    config = replace(
        of, name=f"{of.name}-baseline", baseline_sft=replace(of.baseline_sft, steps=steps, max_seconds=0.0)
    )
    with desk(config) as at:
        at.progress.say(f"{seen} samples, as many as the agent of {run} saw: {steps} steps")
        asyncio.run(_baseline(config, at))
        summary = write_summary(at.run.path, config.evaluate)
    print_summary(summary)


async def _baseline(config: QuickstartConfig, at: Desk) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(actors.cluster_of(config))
        frames = await stack.enter_async_context(actors.clip_pool(config))
        if not at.model(BASELINE).exists():
            with at.timed(BASELINE):
                answers = await uniform_exemplars(config)
                base = Path(config.model)
                await sft(config, at, frames, BASELINE, base, answers, config.baseline_sft)
        fleet = await start_fleet(config, at, frames, stack)
        await Examiner(config, at, fleet).baseline(at.model(BASELINE))


def make_world(config: QuickstartConfig, at: Desk) -> None:
    """Makes the needle videos that are missing."""
    total = sum(config.synth.videos.values())
    with at.timed("synth"), at.progress.stage("synth", total) as stage:
        synthesize(config.synth, stage.advance)
    for path in (config.data.train, config.data.sft, config.data.test):
        check_videos(read_tasks(path), path)


async def _stages(config: QuickstartConfig, at: Desk) -> None:
    async with AsyncExitStack() as stack:
        with at.timed("start Ray"):
            await stack.enter_async_context(actors.cluster_of(config))
            frames = await stack.enter_async_context(actors.clip_pool(config))
        # An engine takes half a minute to start, most of it on one core: time to train the cold start.
        starting = asyncio.create_task(start_fleet(config, at, frames, stack))
        try:
            cold = await cold_start(config, at, frames)
        except BaseException:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            raise
        with at.timed("start engine"), at.progress.stage("start engine", 1) as stage:
            fleet = await starting
            stage.advance()
        examine = Examiner(config, at, fleet)
        await examine.agent(COLD_START, cold)
        trained = await reinforce(config, at, cold, frames, fleet, RL)
        await examine.agent(RL, trained)
        await controls(config, at, frames, cold)
        await examine.agent(SFT_CONTINUED, at.model(SFT_CONTINUED))
        await examine.baseline(at.model(BASELINE))


async def cold_start(config: QuickstartConfig, at: Desk, frames: ClipPool) -> Path:
    """The base taught the protocol by a few exemplars; returns its checkpoint directory."""
    out = at.model(COLD_START)
    if not out.exists():
        with at.timed("cold start"):
            exemplars = await cold_start_exemplars(config, frames)
            await sft(config, at, frames, COLD_START, Path(config.model), exemplars, config.cold_start)
    return out


async def cold_start_exemplars(config: QuickstartConfig, pool: ClipPool) -> list[Trajectory]:
    tasks = read_tasks(config.data.sft)
    wire = wire_of(config.model, config.episode)
    ranker = await actors.image_text(config.episode.selector, pool)
    with LocalFrames(decoder=config.clips.decoder) as local:
        expert = zooming(wire, config.sparse, config.seed)
        return await play_exemplars(tasks, local, wire, config.episode, expert, ranker)


async def uniform_exemplars(config: QuickstartConfig) -> list[Trajectory]:
    """Answers from uniform frames, on all the videos that the agent trains on, each frame count in turn."""
    tasks = [*read_tasks(config.data.sft), *read_tasks(config.data.train)]
    counts = config.baseline.train_frames
    played: list[Trajectory] = []
    with LocalFrames(decoder=config.clips.decoder) as local:
        for count in counts:
            episode = uniform_episode(config, count)
            wire = wire_of(config.model, episode)
            played += await play_exemplars(tasks, local, wire, episode, answering(wire))
    return played


async def sft(
    config: QuickstartConfig,
    at: Desk,
    frames: ClipPool,
    stage: str,
    start: Path,
    trajectories: list[Trajectory],
    length: SftConfig,
) -> SftState:
    """Trains `start` on written turns and exports it as the model of `stage`."""
    learner = replace(config.sft_learner, model=str(start))
    return await teach(learner, config.ray, at, frames, stage, trajectories, length, config.seed)


async def reinforce(
    config: RunConfig, at: Desk, start: Path | str, frames: ClipPool, fleet: Fleet, stage: str
) -> Path:
    """Trains `start` by reinforcement learning; returns the exported policy's directory."""
    out = at.model(stage)
    if out.exists():
        return out
    with at.timed("rl"):
        async with AsyncExitStack() as stack:
            settings = replace(config.learner, model=str(start), replay=at.replay(config.learner))
            share = gpu_share(config.weights.transport)
            learner = await stack.enter_async_context(
                actors.learner(settings, config.ray, frames, at, gpu_share=share)
            )
            store = await stack.enter_async_context(actors.weight_store(config))
            sender = actors.sender_of(learner, config, store, start)
            watch = await stack.enter_async_context(watching(config.observe, at.run, frames, fleet))

            async def attempt() -> None:
                await train(config, at.run, Actors(learner, fleet, sender, watch), at.progress, at.interrupt)
                await learner.export_hf(out)

            await restarting(
                learner, attempt, most=settings.restarts, metrics=at.run.metrics, interrupt=at.interrupt
            )
    return out


async def controls(config: QuickstartConfig, at: Desk, frames: ClipPool, cold: Path) -> None:
    """What RL is compared with, trained side by side: SFT as long as RL took, and the baseline."""
    rl_seconds = stage_seconds(at.run.path)["rl"]
    stages = []
    if not at.model(SFT_CONTINUED).exists():
        length = replace(config.sft_continued, max_seconds=rl_seconds)
        exemplars = await cold_start_exemplars(config, frames)
        stages.append(sft(config, at, frames, SFT_CONTINUED, cold, exemplars, length))
    if not at.model(BASELINE).exists():
        answers = await uniform_exemplars(config)
        base = Path(config.model)
        stages.append(sft(config, at, frames, BASELINE, base, answers, config.baseline_sft))
    with at.timed("controls"):
        await asyncio.gather(*stages)
