"""Complete commands on GPUs: training through Ray, and a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serve.live_server import live_server, tiny_serve_config
from tests.small_run import SmallRun, run_vz_ray, tasks_by_step

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

ON_GPU = (
    "ray.use_gpus=always",
    "learner.zero_stage=2",
    "learner.dtype=bfloat16",
    "rollout.engine.dtype=bfloat16",
)


@pytest.mark.parametrize("transport", ["ipc", pytest.param("nccl", marks=pytest.mark.gpu(2))])
def test_two_training_steps_publish_matching_weights(
    tmp_path: Path, transport: str, record_property: Callable[[str, object], None]
) -> None:
    """IPC shares one GPU between learner and engine; NCCL uses two."""
    small_run = SmallRun.create(tmp_path)
    overrides = [*small_run.overrides(), *ON_GPU, f"weights.transport={transport}", "train.max_steps=2", "name=gpu"]
    done = run_vz_ray("train", "conf/laptop.yaml", *overrides, timeout_s=500)
    assert done.returncode == 0, done.stderr
    run = small_run.runs / "gpu"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert [len(tasks) for tasks in tasks_by_step(run)] == [2, 2]
    for row in rows:
        assert row["weight_sync/probe_gap"] <= row["weight_sync/probe_tolerance"]
        assert row["mismatch/kl"] <= 0.05
    assert (run / "models/policy/config.json").is_file()
    names = ("mismatch/kl", "weight_sync/probe_gap", "weight_sync/seconds", "learner/tokens_per_second")
    record_property("last_step", {name: rows[-1][name] for name in names if name in rows[-1]})


@pytest.mark.parametrize("transport", ["ipc", "shm"])
@pytest.mark.parametrize("sleep_level", [1, 2])
def test_colocated_run_on_one_gpu(
    tmp_path: Path, transport: str, sleep_level: int, record_property: Callable[[str, object], None]
) -> None:
    small_run = SmallRun.create(tmp_path)
    settings = [f"weights.transport={transport}", "train.colocate=true", f"train.sleep_level={sleep_level}"]
    overrides = [*small_run.overrides(), *ON_GPU, *settings, "train.max_steps=3", "name=gpu"]
    done = run_vz_ray("train", "conf/laptop.yaml", *overrides, timeout_s=500)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (small_run.runs / "gpu/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["weight_sync/probe_gap"] <= row["weight_sync/probe_tolerance"]
        assert row["mismatch/kl"] <= 0.05
    names = ("time/sleep_seconds", "weight_sync/wake_seconds", "weight_sync/seconds")
    record_property("last_step", {name: rows[-1][name] for name in names})


@pytest.mark.gpu(2)
def test_colocated_ranks_publish_to_the_engines_on_their_gpus(tmp_path: Path) -> None:
    small_run = SmallRun.create(tmp_path)
    settings = ["weights.transport=ipc", "train.colocate=true", "learner.world_size=2", "rollout.num_workers=2"]
    overrides = [*small_run.overrides(), *ON_GPU, *settings, "learner.zero_stage=3", "train.max_steps=2", "name=gpu"]
    done = run_vz_ray("train", "conf/laptop.yaml", *overrides, timeout_s=500)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_served_request_zooms(tmp_path: Path, eager: bool, record_property: Callable[[str, object], None]) -> None:
    options = {"engine.dtype": "bfloat16", "engine.enforce_eager": eager, "ray.use_gpus": "always"}
    with live_server(tiny_serve_config(tmp_path, **options), tmp_path) as server:
        reply = server.ask("What is it? {zoom 2 4 2} {answer B}")
    assert reply.choices[0].message.content == "B"
    (zoom,) = reply.choices[0].message.zooms
    assert zoom["segment"] == [2.0, 4.0]
    assert len(zoom["pts"]) == 4
    record_property("clip_seconds", zoom["latency"]["clip_s"])
