"""Timeouts of a run are set and logged once, for the GPUs of the cluster."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from vz_ray.config import load_config
from vz_ray.config.run import GrpoRunConfig
from vz_ray.planning.gpu_figures import GPU_CHECK_FILE
from vz_ray.runtime.run_timeouts import run_assumptions, set_timeouts


def recipe(runs: Path, model: str = "Qwen2.5-VL-7B") -> GrpoRunConfig:
    overrides = [f"model={model}", f"runs={runs}"]
    return load_config(GrpoRunConfig, "conf/videozoomer-7b-rl.yaml", overrides)


@pytest.fixture
def log_lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="vz_ray.runtime.run_timeouts")
    return caplog


def test_timeouts_are_set_and_logged(tmp_path: Path, log_lines: pytest.LogCaptureFixture) -> None:
    config = recipe(tmp_path)
    set_timeouts(config, gpus=True, resources=["CPU", "GPU", "accelerator_type:H100"])
    assert config.rollout.turn_timeout_s == config.timeouts.turn_s
    assert config.rollout.turn_timeout_s > 300
    messages = [record.getMessage() for record in log_lines.records]
    assert len(messages) == 5
    assert messages[1].startswith(f"timeouts.turn_s is {config.timeouts.turn_s:.0f} s: 2 x (")


def test_slowest_gpu_of_the_cluster_counts(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    resources = ["accelerator_type:H100", "accelerator_type:L40S"]
    assumptions, warnings = run_assumptions(config, resources)
    assert (assumptions.gpu, warnings) == ("L40S", [])


def test_unknown_gpu_is_named_in_one_line(tmp_path: Path) -> None:
    assumptions, [warning] = run_assumptions(recipe(tmp_path), ["accelerator_type:X1"])
    assert assumptions.gpu == "H100"
    assert warning == "The speed of GPU X1 is unknown; timeouts follow from H100, assumed."


def test_figures_of_another_gpu_are_ignored(tmp_path: Path, log_lines: pytest.LogCaptureFixture) -> None:
    device = {"index": 0, "name": "NVIDIA L4", "tflops": 90.0, "memory_gbps": 250.0, "host_gbps": 12.0}
    gpu = {"index": 0, "total_gib": 22.5, "mig": False}
    (tmp_path / GPU_CHECK_FILE).write_text(json.dumps({"gpus": [gpu], "figures": {"devices": [device]}}))
    config = recipe(tmp_path)
    assert run_assumptions(config, [])[0].gpu == "NVIDIA L4"
    set_timeouts(config, gpus=True, resources=["accelerator_type:H100"])
    assert "it measured NVIDIA L4, the plan is for H100" in log_lines.records[0].getMessage()


def test_cpu_run_and_unknown_model_have_minimums(tmp_path: Path, log_lines: pytest.LogCaptureFixture) -> None:
    for config, gpus, reason in (
        (recipe(tmp_path), False, "the minimum; engines and learner run on CPUs"),
        (recipe(tmp_path, "elsewhere"), True, "the minimum; no plan, because model is 'elsewhere'"),
    ):
        log_lines.clear()
        set_timeouts(config, gpus=gpus, resources=[])
        assert (config.rollout.turn_timeout_s, config.learner.timeout_s) == (300, 3600)
        assert reason in log_lines.records[0].getMessage()
