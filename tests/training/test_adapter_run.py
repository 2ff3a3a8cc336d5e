"""A run whose engines receive LoRA adapters: steps, a stop, a resume, and its export."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from tests.small_run import SmallRun, run_vz_ray, send_signal, start_vz_ray, wait_for_exit, wait_until
from vz_ray.learner.policy_model import load_pretrained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

LORA = ("learner.lora.rank=8", "learner.lora.alpha=64", "learner.optimizer.learning_rate=0.01")


def test_stopped_and_resumed_run_publishes_adapters(tmp_path: Path) -> None:
    small_run = SmallRun.create(tmp_path)
    arguments = ["train", "conf/laptop.yaml", *small_run.overrides(), *LORA, "name=lora"]
    run = small_run.runs / "lora"
    process = start_vz_ray(*arguments, "train.max_steps=3")
    wait_until(lambda: (run / "checkpoints/step-000001").is_dir(), process, 600)
    send_signal(process, signal.SIGINT)
    assert wait_for_exit(process, 600).returncode == 130
    resumed = run_vz_ray(*arguments, "train.max_steps=3", timeout_s=600)
    assert resumed.returncode == 0, resumed.stderr

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    base, policy = (
        dict(load_pretrained(path, torch.float32).named_parameters())
        for path in (small_run.folder / "base", run / "models/policy")
    )
    adapter = load_file(run / "models/policy/adapter/adapter_model.safetensors")
    assert {row["weight_sync/bytes"] for row in rows} == {sum(tensor.nbytes for tensor in adapter.values())}
    assert rows[0]["weight_sync/bytes"] < sum(tensor.nbytes for tensor in base.values()) / 10
    for row in rows:
        assert row["weight_sync/probe_gap"] <= row["weight_sync/probe_tolerance"] <= 1e-4
        assert row["mismatch/logprob_abs_max"] <= 1e-4
    changed = {name for name, tensor in policy.items() if not torch.equal(tensor, base[name])}
    layers = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in adapter}
    assert changed == {f"{layer}.weight" for layer in layers}
