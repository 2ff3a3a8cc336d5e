"""Evaluates models one after another on the same test questions and the same engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vz_ray import actors
from vz_ray.config.episode import EpisodeConfig, uniform
from vz_ray.config.quickstart import QuickstartConfig
from vz_ray.config.run import RunConfig
from vz_ray.data.rl_file import read_tasks
from vz_ray.desk import Desk
from vz_ray.evaluate.play import evaluate
from vz_ray.evaluate.results import EvalLog
from vz_ray.evaluate.summary import eval_path, uniform_stage
from vz_ray.rollout.fleet import Fleet
from vz_ray.weights import ModuleSource, ShmSender, WeightStore


class Examiner:
    """Evaluates one model after another on the test questions, all on the same engines."""

    def __init__(self, config: QuickstartConfig, at: Desk, fleet: Fleet) -> None:
        self.config, self.at, self.fleet = config, at, fleet
        self.tasks = read_tasks(config.data.test)
        self.holds: Path | None = None

    async def agent(self, stage: str, model: Path) -> None:
        """The zooming agent, greedy."""
        await self._play(stage, model, self.config.episode)

    async def baseline(self, model: Path) -> None:
        """The uniform baseline at each number of frames."""
        for count in self.config.baseline.test_frames:
            await self._play(uniform_stage(count), model, uniform_episode(self.config, count))

    async def _play(self, stage: str, model: Path, episode: EpisodeConfig) -> None:
        identity = {"model": str(model), "tasks": self.config.data.test, "stage": stage}
        log = EvalLog(eval_path(self.at.run.path, stage), identity)
        if len(log.done) == len(self.tasks):
            return
        with self.at.timed("evaluate"), self.at.progress.stage(f"evaluate {stage}", len(self.tasks)) as bar:
            await self._hold(model)
            playing = evaluate(self.fleet, self.tasks, log, episode, stage=stage, advance=bar.advance)
            await self.at.interrupt.watch(playing)

    async def _hold(self, model: Path) -> None:
        """Publishes `model` to the engines unless they hold it."""
        if self.holds != model:
            await hold(model, self.config, self.fleet)
            self.holds = model


async def hold(model: Path, config: RunConfig, fleet: Fleet) -> None:
    """Publishes the weights of a checkpoint directory to the engines."""
    import torch

    from vz_ray.learner.model import load_pretrained

    async with actors.weight_store(config) as folder:
        source = ModuleSource(load_pretrained(model, torch.float32))
        await fleet.publish(fleet.version + 1, ShmSender(WeightStore(folder), source))


def uniform_episode(config: QuickstartConfig, frames: int) -> EpisodeConfig:
    """The rules by which the baseline plays at a number of frames."""
    return replace(uniform(config.episode, frames), prompt=config.baseline.prompt)
