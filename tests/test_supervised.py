"""`vz-ray sft`: trajectories from a file, checked, learned from and exported."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.small_run import SmallRun, vz_ray
from vz_ray.coldstart.exemplars import play_exemplars, zooming
from vz_ray.config import load
from vz_ray.config.run import RunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.data.record import EpisodeRecord, append_records
from vz_ray.data.rl_file import read_tasks
from vz_ray.observe.errors import UserError
from vz_ray.supervised import read_trajectories, wire_of
from vz_ray.video.local import LocalFrames


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return SmallRun.make(tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def exemplars(small: SmallRun) -> Path:
    config = load(RunConfig, "conf/tiny.yaml", [f"model={small.folder / 'base'}"])
    wire, tasks = wire_of(config.model, config.episode), read_tasks(small.data("sft"))
    with LocalFrames() as frames:
        played = asyncio.run(play_exemplars(tasks, frames, wire, config.episode, zooming(wire)))
    path = small.folder / "exemplars.jsonl"
    append_records(path, [EpisodeRecord(task, one) for task, one in zip(tasks, played, strict=True)])
    return path


def overrides(small: SmallRun, exemplars: Path) -> list[str]:
    episode = {"prompt": "conf/prompt/tiny.yaml", "min_pixels": 784, "max_pixels": 784, "max_context": 2048}
    settings = [f"episode.{key}={value}" for key, value in episode.items()]
    learner = ["learner.zero_stage=0", "learner.loss.kl=0", "learner.threads=1"]
    small_ones = ["clips.actors=1", "clips.disk_gb=0", "sft.steps=2", "sft.batch=2", "sft.schedule=cosine"]
    paths = [f"runs={small.runs}", f"model={small.folder / 'base'}", f"data={exemplars}"]
    return [*settings, *learner, *small_ones, *paths]


def test_a_checkpoint_is_taught_and_exported(small: SmallRun, exemplars: Path) -> None:
    ended = vz_ray("sft", *overrides(small, exemplars), "name=taught")
    assert ended.returncode == 0, ended.stderr
    policy = small.runs / "taught" / "models" / "policy"
    assert (policy / "config.json").exists()
    weights = "model.safetensors"
    assert (policy / weights).read_bytes() != (small.folder / "base" / weights).read_bytes()
    assert len((small.runs / "taught" / "policy.jsonl").read_text().splitlines()) == 2


def test_trajectories_of_another_wording_or_too_long_are_named(small: SmallRun, exemplars: Path) -> None:
    given = overrides(small, exemplars)
    assert len(read_trajectories(load(SftRunConfig, None, given))) == 4
    other = load(SftRunConfig, None, [*given, "episode.prompt=conf/prompt/zoom.yaml"])
    with pytest.raises(
        UserError, match=r"trajectory 0/sft-0000-\w+/0#0 is written as clean-.*set episode.prompt"
    ):
        read_trajectories(other)
    tight = load(SftRunConfig, None, [*given, "episode.max_context=64"])
    with pytest.raises(UserError, match=r"tokens, above episode\.max_context \(64\)"):
        read_trajectories(tight)


def test_a_file_that_holds_no_episodes_is_named(small: SmallRun, exemplars: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("exemplars\n")
    for name in ("none.jsonl", "text.jsonl"):
        config = load(SftRunConfig, None, [*overrides(small, exemplars), f"data={tmp_path / name}"])
        with pytest.raises(UserError, match=rf"{name} is no file of episodes"):
            read_trajectories(config)
