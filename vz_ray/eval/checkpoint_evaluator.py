"""Evaluate several checkpoints on the same test tasks and the same engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vz_ray.config.episode import EpisodeConfig, uniform_frames_config
from vz_ray.config.quickstart import QuickstartConfig
from vz_ray.config.run import GrpoRunConfig
from vz_ray.data.task_file import read_tasks
from vz_ray.eval.eval_log import EvalLog
from vz_ray.eval.run_summary import eval_log_path, uniform_stage
from vz_ray.eval.runner import evaluate
from vz_ray.rollout.rollout_scheduler import RolloutScheduler
from vz_ray.runtime import runtime
from vz_ray.runtime.run_context import RunContext
from vz_ray.weight_sync import ModuleSource, ShmTransport, WeightStore


class CheckpointEvaluator:
    """Publishes one model after another to the engines and evaluates each on the test tasks.

    Args:
        run: Its directory receives the evaluation logs. Completed evaluations are not repeated.
        scheduler: Rollout workers of the evaluations.
    """

    def __init__(self, config: QuickstartConfig, run: RunContext, scheduler: RolloutScheduler) -> None:
        self.config, self.run, self.scheduler = config, run, scheduler
        self.tasks = read_tasks(config.data.test)
        self.loaded_model: Path | None = None

    async def evaluate_agent(self, stage: str, model: Path) -> None:
        """Evaluate the zooming agent with greedy sampling."""
        await self._evaluate(stage, model, self.config.episode)

    async def evaluate_baseline(self, model: Path) -> None:
        """Evaluate the uniform baseline at each number of test frames."""
        for frames in self.config.baseline.test_frames:
            episode = baseline_episode_config(self.config, frames)
            await self._evaluate(uniform_stage(frames), model, episode)

    async def _evaluate(self, stage: str, model: Path, episode: EpisodeConfig) -> None:
        identity = {"model": str(model), "tasks": self.config.data.test, "stage": stage}
        log = EvalLog(eval_log_path(self.run.run_dir.path, stage), identity)
        if len(log.completed) == len(self.tasks):
            return
        with (
            self.run.time_stage("evaluate"),
            self.run.progress.stage(f"evaluate {stage}", len(self.tasks)) as progress,
        ):
            if self.loaded_model != model:
                await load_weights(model, self.config, self.scheduler)
                self.loaded_model = model
            await self.run.interrupt.run_interruptible(
                evaluate(self.scheduler, self.tasks, log, episode, stage=stage, on_progress=progress.advance)
            )


async def load_weights(model: Path, config: GrpoRunConfig, scheduler: RolloutScheduler) -> None:
    """Publish the weights of a checkpoint directory to the engines."""
    import torch

    from vz_ray.learner.policy_model import load_pretrained

    async with runtime.weight_store_dir(config) as directory:
        source = ModuleSource(load_pretrained(model, torch.float32))
        await scheduler.pool.publish(scheduler.pool.version + 1, ShmTransport(WeightStore(directory), source))


def baseline_episode_config(config: QuickstartConfig, frames: int) -> EpisodeConfig:
    """Return the episode config of the uniform baseline with `frames` frames."""
    return replace(uniform_frames_config(config.episode, frames), prompt=config.baseline.prompt)
