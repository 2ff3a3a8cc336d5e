"""`vz-ray sft`: trajectories from a file, checked, learned from and exported."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.small_run import SmallRun, vz_ray
from vz_ray.coldstart.exemplars import play_exemplars, zooming
from vz_ray.config import load
from vz_ray.config.run import RunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.data.record import EpisodeRecord, append_records, read_records
from vz_ray.data.rl_file import read_tasks
from vz_ray.data.sft_file import sample_of
from vz_ray.data.sft_source import read_source, wire_of
from vz_ray.observe.errors import UserError
from vz_ray.observe.metrics import read_metrics
from vz_ray.video.frame import Frame, FrameRef
from vz_ray.video.image import encode_image
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


def test_a_supervised_run_is_watched_as_any_other(
    small: SmallRun, exemplars: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`live.json`, TensorBoard, MLflow where it is installed, and log lines that name run, rank and step."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = small.runs / "watched"
    mlruns = small.folder / "mlruns"
    with_mlflow = importlib.util.find_spec("mlflow") is not None
    uri = [f"observe.mlflow_uri={mlruns.as_uri()}"] if with_mlflow else []
    more = ["observe.log_format=json", "observe.pulse_s=1", "sft.steps=3", *uri]
    ended = vz_ray("sft", *overrides(small, exemplars), *more, "name=watched")
    assert ended.returncode == 0, ended.stderr
    live = json.loads((run / "live.json").read_text())
    assert (live["state"], live["unit"], live["iteration"], live["iterations"]) == ("ended", "step", 3, 3)
    assert (live["fleet"], live["checkpoint"]["iteration"], live["clips"]["decoders"]) == ({}, 3, 1)
    rows = read_metrics(run / "policy.jsonl")
    events = EventAccumulator(str(run / "tensorboard" / "policy")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])
    shown = vz_ray("top", str(run), "--once").stdout
    assert "step 3 of 3" in shown
    assert re.search(r"loss +\S{3} +\d", shown)
    lines = [json.loads(line) for line in (run / "logs" / "vz_ray.log").read_text().splitlines()]
    assert {line["run"] for line in lines} == {"watched"}
    ranks = [json.loads(line) for line in objects(run / "logs" / "learner-rank-0.log")]
    assert ranks
    assert {(line["run"], line["worker"], line["rank"]) for line in ranks} == {
        ("watched", "learner-rank-0", 0)
    }
    if with_mlflow:
        [tracked] = mlruns.glob("*/*/metrics/loss")
        assert [float(line.split()[1]) for line in tracked.read_text().splitlines()] == pytest.approx(
            [row["loss"] for row in rows]
        )


def objects(path: Path) -> list[str]:
    """The lines of a log that are objects; what C code prints is none."""
    return [line for line in path.read_text().splitlines() if line.startswith("{")]


def test_trajectories_of_another_wording_or_too_long_are_named(small: SmallRun, exemplars: Path) -> None:
    given = overrides(small, exemplars)
    assert len(read_source(load(SftRunConfig, None, given))) == 4
    other = load(SftRunConfig, None, [*given, "episode.prompt=conf/prompt/zoom.yaml"])
    with pytest.raises(
        UserError, match=r"trajectory 0/sft-0000-\w+/0#0 is written as clean-.*set episode.prompt"
    ):
        read_source(other)
    tight = load(SftRunConfig, None, [*given, "episode.max_context=64"])
    with pytest.raises(UserError, match=r"tokens, above episode\.max_context \(64\)"):
        read_source(tight)


@pytest.fixture(scope="module")
def samples(small: SmallRun, exemplars: Path) -> Path:
    """The same exemplars in the common layout, with images on disk; one has a turn that is only read."""
    folder = small.folder / "samples"
    config = load(RunConfig, "conf/tiny.yaml", [f"model={small.folder / 'base'}"])
    wire = wire_of(config.model, config.episode)
    trajectories = [record.trajectory for record in read_records(exemplars)]
    with LocalFrames() as frames:
        refs = [ref for trajectory in trajectories for ref in trajectory.refs]
        found = asyncio.run(resolved(frames, refs))
    (folder / "images").mkdir(parents=True)
    for frame in found:
        (folder / "images" / f"{frame.ref.digest}.png").write_bytes(encode_image(frame.rgb))
    records = [
        sample_of(one, wire, lambda ref: f"images/{ref.digest}.png", given=int(number == 0))
        for number, one in enumerate(sorted(trajectories, key=lambda one: -len(one.turns)))
    ]
    (folder / "sft.json").write_text(json.dumps(records))
    return folder / "sft.json"


async def resolved(frames: LocalFrames, refs: Sequence[FrameRef]) -> list[Frame]:
    return await frames.resolve(refs)


def test_samples_of_the_common_layout_teach_as_episodes_do(
    small: SmallRun, exemplars: Path, samples: Path
) -> None:
    """Through the real learner, with images by path that the decoders read."""
    ended = vz_ray("sft", *overrides(small, samples), "sft.batch=4", "name=samples")
    assert ended.returncode == 0, ended.stderr
    assert "4 trajectories, at most 2 times each" in ended.stdout
    policy = small.runs / "samples" / "models" / "policy"
    assert (policy / "config.json").exists()
    weights = "model.safetensors"
    assert (policy / weights).read_bytes() != (small.folder / "base" / weights).read_bytes()
    assert len((small.runs / "samples" / "policy.jsonl").read_text().splitlines()) == 2


def test_samples_too_long_or_not_of_the_layout_are_named(
    small: SmallRun, samples: Path, tmp_path: Path
) -> None:
    tight = vz_ray("sft", *overrides(small, samples), "episode.max_context=64", "name=tight")
    assert tight.returncode == 2
    assert "sft.json: trajectory 0/sft-0/0#0 has" in tight.stderr
    assert "above episode.max_context (64)" in tight.stderr
    broken = samples.parent / "broken.json"
    broken.write_text(json.dumps([{**json.loads(samples.read_text())[0], "images": []}]))
    config = load(SftRunConfig, None, [*overrides(small, samples), f"data={broken}"])
    with pytest.raises(UserError, match=r"broken\.json, record 0: \d+ <image> in messages for 0 images"):
        read_source(config)


@pytest.mark.parametrize(
    "text",
    ["exemplars\n", "", "{}", '{"task": 1}\n', '"messages"', "{\n", "\x00\xff", '{"conversations": []}'],
)
def test_a_file_of_neither_layout_is_named(
    small: SmallRun, exemplars: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "other.jsonl").write_text(text, encoding="latin-1")
    config = load(SftRunConfig, None, [*overrides(small, exemplars), f"data={tmp_path / 'other.jsonl'}"])
    with pytest.raises(UserError, match=r"other\.jsonl holds neither samples .* nor episodes"):
        read_source(config)


def test_a_missing_file_and_a_broken_log_are_named(small: SmallRun, exemplars: Path, tmp_path: Path) -> None:
    given = overrides(small, exemplars)
    with pytest.raises(UserError, match=r"cannot read .*none\.jsonl"):
        read_source(load(SftRunConfig, None, [*given, f"data={tmp_path / 'none.jsonl'}"]))
    (tmp_path / "log.jsonl").write_text('{"trajectory": 1}\n')
    with pytest.raises(UserError, match=r"log\.jsonl is no file of episodes"):
        read_source(load(SftRunConfig, None, [*given, f"data={tmp_path / 'log.jsonl'}"]))
