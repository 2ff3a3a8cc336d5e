"""Evaluates models one after another on the same test questions and the same engines."""

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
    """Evaluates one model after another on the test questions, all on the same engines."""

    def __init__(self, config: QuickstartConfig, at: RunContext, fleet: RolloutScheduler) -> None:
        self.config, self.run, self.scheduler = config, at, fleet
        self.tasks = read_tasks(config.data.test)
        self.loaded_model: Path | None = None

    async def evaluate_agent(self, stage: str, model: Path) -> None:
        """The zooming agent, greedy."""
        await self._play(stage, model, self.config.episode)

    async def evaluate_baseline(self, model: Path) -> None:
        """The uniform baseline at each number of frames."""
        for count in self.config.baseline.test_frames:
            await self._play(uniform_stage(count), model, baseline_episode_config(self.config, count))

    async def _play(self, stage: str, model: Path, episode: EpisodeConfig) -> None:
        identity = {"model": str(model), "tasks": self.config.data.test, "stage": stage}
        log = EvalLog(eval_log_path(self.run.run_dir.path, stage), identity)
        if len(log.completed) == len(self.tasks):
            return
        with (
            self.run.time_stage("evaluate"),
            self.run.progress.stage(f"evaluate {stage}", len(self.tasks)) as bar,
        ):
            await self._hold(model)
            playing = evaluate(self.scheduler, self.tasks, log, episode, stage=stage, on_progress=bar.advance)
            await self.run.interrupt.run_interruptible(playing)

    async def _hold(self, model: Path) -> None:
        """Publishes `model` to the engines unless they hold it."""
        if self.loaded_model != model:
            await load_weights(model, self.config, self.scheduler)
            self.loaded_model = model


async def load_weights(model: Path, config: GrpoRunConfig, fleet: RolloutScheduler) -> None:
    """Publishes the weights of a checkpoint directory to the engines."""
    import torch

    from vz_ray.learner.policy_model import load_pretrained

    async with runtime.weight_store_dir(config) as folder:
        source = ModuleSource(load_pretrained(model, torch.float32))
        await fleet.publish(fleet.version + 1, ShmTransport(WeightStore(folder), source))


def baseline_episode_config(config: QuickstartConfig, frames: int) -> EpisodeConfig:
    """The rules by which the baseline plays at a number of frames."""
    return replace(uniform_frames_config(config.episode, frames), prompt=config.baseline.prompt)
