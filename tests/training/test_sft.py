"""`vz-ray sft`: read trajectories, train, export."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.small_run import SmallRun, run_vz_ray
from vz_ray.config import load_config
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.data.chat_format_loader import load_chat_format
from vz_ray.data.episode_record import EpisodeRecord, append_records, read_records
from vz_ray.data.sft_data import read_sft_data
from vz_ray.data.sft_file import trajectory_to_sample
from vz_ray.data.task_file import read_tasks
from vz_ray.monitoring.metric_logger import read_metrics
from vz_ray.needle.exemplars import collect_exemplars, zoom_oracle_factory
from vz_ray.utils.errors import UserError
from vz_ray.video.frame import Frame, FrameRef
from vz_ray.video.image_encoding import encode_image
from vz_ray.video.local_source import LocalFrameSource


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return SmallRun.create(tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def exemplars(small: SmallRun) -> Path:
    config = load_config(GrpoRunConfig, "conf/laptop.yaml", [f"model={small.folder / 'base'}"])
    chat_format, tasks = load_chat_format(config.model, config.episode), read_tasks(small.data("sft"))
    with LocalFrameSource() as frames:
        trajectories = asyncio.run(
            collect_exemplars(tasks, frames, chat_format, config.episode, zoom_oracle_factory(chat_format))
        )
    path = small.folder / "exemplars.jsonl"
    append_records(path, [EpisodeRecord(*pair) for pair in zip(tasks, trajectories, strict=True)])
    return path


def overrides(small: SmallRun, exemplars: Path) -> list[str]:
    episode = {"prompt": "conf/prompt/tiny.yaml", "min_pixels": 784, "max_pixels": 784, "max_context": 2048}
    settings = [f"episode.{key}={value}" for key, value in episode.items()]
    learner = ["learner.zero_stage=0", "learner.loss.kl_coef=0"]
    sizes = [
        "clips.num_actors=1",
        "clips.disk_cache_gib=0",
        "sft.max_steps=2",
        "sft.batch_size=2",
        "sft.lr_schedule=cosine",
    ]
    paths = [f"runs={small.runs}", f"model={small.folder / 'base'}", f"data={exemplars}"]
    return [*settings, *learner, *sizes, *paths]


def test_checkpoint_is_trained_and_exported(small: SmallRun, exemplars: Path) -> None:
    result = run_vz_ray("sft", *overrides(small, exemplars), "name=trained")
    assert result.returncode == 0, result.stderr
    policy = small.runs / "trained" / "models" / "policy"
    assert (policy / "config.json").exists()
    weights = "model.safetensors"
    assert (policy / weights).read_bytes() != (small.folder / "base" / weights).read_bytes()
    assert len((small.runs / "trained" / "policy.jsonl").read_text().splitlines()) == 2


def test_sft_run_writes_status_metrics_and_logs(
    small: SmallRun, exemplars: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Covers `live.json`, TensorBoard, MLflow if installed, and log lines with run, rank and step."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = small.runs / "monitored"
    mlruns = small.folder / "mlruns"
    with_mlflow = importlib.util.find_spec("mlflow") is not None
    uri = [f"monitoring.mlflow_tracking_uri={mlruns.as_uri()}"] if with_mlflow else []
    more = ["monitoring.log_format=json", "monitoring.poll_interval_s=1", "sft.max_steps=3", *uri]
    result = run_vz_ray("sft", *overrides(small, exemplars), *more, "name=monitored")
    assert result.returncode == 0, result.stderr
    live = json.loads((run / "live.json").read_text())
    assert (live["state"], live["run_kind"], live["step"], live["max_steps"]) == ("ended", "sft", 3, 3)
    assert (live["rollout"], live["checkpoint"]["step"], live["decode"]["decoders"]) == ({}, 3, 1)
    rows = read_metrics(run / "policy.jsonl")
    events = EventAccumulator(str(run / "tensorboard" / "policy")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])
    screen = run_vz_ray("top", str(run), "--once").stdout
    assert "step 3 of 3" in screen
    assert re.search(r"loss +\S{3} +\d", screen)
    lines = [json.loads(line) for line in (run / "logs" / "vz_ray.log").read_text().splitlines()]
    assert {line["run"] for line in lines} == {"monitored"}
    ranks = [json.loads(line) for line in json_lines(run / "logs" / "learner-rank-0.log")]
    assert ranks
    assert {(line["run"], line["worker"], line["rank"]) for line in ranks} == {("monitored", "learner-rank-0", 0)}
    if with_mlflow:
        [tracked] = mlruns.glob("*/*/metrics/loss")
        assert [float(line.split()[1]) for line in tracked.read_text().splitlines()] == pytest.approx(
            [row["loss"] for row in rows]
        )


def json_lines(path: Path) -> list[str]:
    """Return the JSON lines of a log; C libraries print other lines."""
    return [line for line in path.read_text().splitlines() if line.startswith("{")]


def test_other_prompt_or_long_trajectory_is_rejected(small: SmallRun, exemplars: Path) -> None:
    base_overrides = overrides(small, exemplars)
    assert len(read_sft_data(load_config(SftRunConfig, None, base_overrides))) == 4
    other_prompt = load_config(SftRunConfig, None, [*base_overrides, "episode.prompt=conf/prompt/zoom.yaml"])
    with pytest.raises(
        UserError,
        match=r"trajectory 0/sft-0000-\w+/0#0 has the chat format clean-.*set model and episode.prompt",
    ):
        read_sft_data(other_prompt)
    short_context = load_config(SftRunConfig, None, [*base_overrides, "episode.max_context=64"])
    with pytest.raises(UserError, match=r"tokens, above episode\.max_context \(64\)"):
        read_sft_data(short_context)


@pytest.fixture(scope="module")
def samples(small: SmallRun, exemplars: Path) -> Path:
    """Write the exemplars as samples with images on disk; one has a context turn that is not trained on."""
    folder = small.folder / "samples"
    config = load_config(GrpoRunConfig, "conf/laptop.yaml", [f"model={small.folder / 'base'}"])
    chat_format = load_chat_format(config.model, config.episode)
    trajectories = [record.trajectory for record in read_records(exemplars)]
    with LocalFrameSource() as frames:
        refs = [ref for trajectory in trajectories for ref in trajectory.frame_refs]
        images = asyncio.run(resolve_frames(frames, refs))
    (folder / "images").mkdir(parents=True)
    for frame in images:
        (folder / "images" / f"{frame.ref.digest}.png").write_bytes(encode_image(frame.rgb))
    records = [
        trajectory_to_sample(
            trajectory, chat_format, lambda ref: f"images/{ref.digest}.png", num_context_turns=int(index == 0)
        )
        for index, trajectory in enumerate(sorted(trajectories, key=lambda item: -len(item.turns)))
    ]
    (folder / "sft.json").write_text(json.dumps(records))
    return folder / "sft.json"


async def resolve_frames(frames: LocalFrameSource, refs: Sequence[FrameRef]) -> list[Frame]:
    return await frames.resolve(refs)


def test_samples_with_images_are_trained_on(small: SmallRun, exemplars: Path, samples: Path) -> None:
    """Uses the real learner; the decode pool reads the images."""
    result = run_vz_ray("sft", *overrides(small, samples), "sft.batch_size=4", "name=samples")
    assert result.returncode == 0, result.stderr
    assert "4 trajectories, at most 2 epochs" in result.stdout
    policy = small.runs / "samples" / "models" / "policy"
    assert (policy / "config.json").exists()
    weights = "model.safetensors"
    assert (policy / weights).read_bytes() != (small.folder / "base" / weights).read_bytes()
    assert len((small.runs / "samples" / "policy.jsonl").read_text().splitlines()) == 2


def test_long_or_malformed_samples_are_rejected(small: SmallRun, samples: Path, tmp_path: Path) -> None:
    result = run_vz_ray("sft", *overrides(small, samples), "episode.max_context=64", "name=tight")
    assert result.returncode == 2
    assert "sft.json: trajectory 0/sft-0/0#0 has" in result.stderr
    assert "above episode.max_context (64)" in result.stderr
    broken = samples.parent / "broken.json"
    broken.write_text(json.dumps([{**json.loads(samples.read_text())[0], "images": []}]))
    config = load_config(SftRunConfig, None, [*overrides(small, samples), f"data={broken}"])
    with pytest.raises(UserError, match=r"broken\.json, record 0: \d+ <image> in messages for 0 images"):
        read_sft_data(config)


@pytest.mark.parametrize(
    "text",
    ["exemplars\n", "", "{}", '{"task": 1}\n', '"messages"', "{\n", "\x00\xff", '{"conversations": []}'],
)
def test_file_of_unknown_layout_is_rejected(small: SmallRun, exemplars: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "other.jsonl").write_text(text, encoding="latin-1")
    config = load_config(SftRunConfig, None, [*overrides(small, exemplars), f"data={tmp_path / 'other.jsonl'}"])
    with pytest.raises(UserError, match=r"other\.jsonl contains neither SFT samples .* nor episodes"):
        read_sft_data(config)


def test_missing_file_and_malformed_log_are_named(small: SmallRun, exemplars: Path, tmp_path: Path) -> None:
    base_overrides = overrides(small, exemplars)
    with pytest.raises(UserError, match=r"cannot read .*none\.jsonl"):
        read_sft_data(load_config(SftRunConfig, None, [*base_overrides, f"data={tmp_path / 'none.jsonl'}"]))
    (tmp_path / "log.jsonl").write_text('{"trajectory": 1}\n')
    with pytest.raises(UserError, match=r"log\.jsonl is not a valid episode file"):
        read_sft_data(load_config(SftRunConfig, None, [*base_overrides, f"data={tmp_path / 'log.jsonl'}"]))
