"""Supervised training without Ray: real torchrun, real videos, one rank and two."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.small_run import SmallRun
from vz_ray.config import load_config
from vz_ray.config.sft import SftRunConfig
from vz_ray.data.episode_record import EpisodeRecord, append_records
from vz_ray.data.sft_data import load_chat_format
from vz_ray.data.task_file import read_tasks
from vz_ray.learner import torchrun
from vz_ray.learner.trainer import Trainer
from vz_ray.needle.exemplars import collect_exemplars, zoom_oracle_factory
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import StopRequested
from vz_ray.utils.step_dirs import list_steps

QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run of three steps on real episodes."""
    small = SmallRun.create(tmp_path_factory.mktemp("alone"))
    exemplars, base = small.folder / "exemplars.jsonl", small.folder / "base"
    episode = {"prompt": "conf/prompt/tiny.yaml", "min_pixels": 784, "max_pixels": 784, "max_context": 2048}
    learner = {"zero_stage": 2, "loss.kl_coef": 0, "num_threads": 1, "optimizer.epsilon": 1e-3}
    overrides = [
        *(f"episode.{key}={value}" for key, value in episode.items()),
        *(f"learner.{key}={value}" for key, value in learner.items()),
        *("sft.max_steps=3", "sft.batch_size=2", "sft.lr_schedule=cosine"),
        *(f"runs={small.runs}", f"model={base}", f"data={exemplars}"),
    ]
    config = load_config(SftRunConfig, None, [f"episode.{key}={value}" for key, value in episode.items()])
    wire, tasks = load_chat_format(base, config.episode), read_tasks(small.data("sft"))
    with torchrun.LocalFrameSource() as frames:
        played = asyncio.run(
            collect_exemplars(tasks, frames, wire, config.episode, zoom_oracle_factory(wire))
        )
    append_records(exemplars, [EpisodeRecord(t, one) for t, one in zip(tasks, played, strict=True)])
    return overrides


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "models" / "policy" / "model.safetensors")


@pytest.fixture(scope="module")
def straight(given: list[str]) -> Path:
    """The run of one rank, in this process."""
    return torchrun.train_sft(load_config(SftRunConfig, None, [*given, "name=straight"])).parent.parent


def test_two_ranks_under_torchrun_learn_what_one_learns_without_ray_or_vllm(
    given: list[str], straight: Path, tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*torchrun, "-m", "tests.learner.torchrun_worker", str(tmp_path), "sft", *given, "name=two"],
        env=os.environ | QUIET,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    for rank in range(2):
        imported = json.loads((tmp_path / f"imported-{rank}.json").read_text())
        assert "deepspeed" in imported
        assert {"ray", "vllm"} & set(imported) == set()
    two = straight.parent / "two"
    assert f"the policy is in {two / 'models' / 'policy'}" in ended.stdout.replace("\n", "")
    rows, expected = (
        [json.loads(line) for line in (run / "policy.jsonl").read_text().splitlines()]
        for run in (two, straight)
    )
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-4)
    for name, value in weights(straight).items():
        np.testing.assert_allclose(weights(two)[name], value, atol=2e-6, rtol=0, err_msg=name)


def test_a_stopped_run_goes_on_where_it_was(
    given: list[str], straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real SIGTERM in the middle of the first step: that step is kept, and the end is the same."""
    config = load_config(SftRunConfig, None, [*given, "name=stopped"])
    step = Trainer.sft_step
    taken = []

    def stopped(self: Trainer, *args: Any) -> dict[str, float]:
        if not taken:
            os.kill(os.getpid(), signal.SIGTERM)
        taken.append(1)
        return step(self, *args)

    monkeypatch.setattr(Trainer, "sft_step", stopped)
    with pytest.raises(StopRequested):
        torchrun.train_sft(config)
    run = straight.parent / "stopped"
    assert len(taken) == 1
    assert not (run / "models").exists()
    (left,) = list_steps(run / "checkpoints" / "policy")
    assert json.loads((left / "sft.json").read_text())["steps"] == 1
    assert torchrun.train_sft(config) == run / "models" / "policy"
    assert len(taken) == 3
    for name, value in weights(straight).items():
        assert np.array_equal(weights(run)[name], value), name


def test_weights_that_give_no_numbers_end_the_run_and_can_be_looked_into(
    given: list[str], straight: Path, tmp_path: Path
) -> None:
    """The command that plays the kept batch again decodes its frames from the videos themselves."""
    from safetensors.numpy import save_file
    from typer.testing import CliRunner

    from vz_ray.cli import app

    base = Path(next(text for text in given if text.startswith("model=")).removeprefix("model="))
    broken = shutil.copytree(base, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] *= np.float32(3e38)  # the last one, under the name that HF writes
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    config = load_config(
        SftRunConfig, None, [*given, f"model={broken}", "learner.max_skipped_updates=2", "name=broken"]
    )
    kept = (straight.parent / "broken" / "replay" / "step-000000-2").resolve()
    with pytest.raises(UserError, match=f"2 updates in a row .* are in {kept}"):
        torchrun.train_sft(config)
    assert not (straight.parent / "broken" / "models").exists()
    shutil.rmtree(broken)
    said = CliRunner().invoke(app, ["replay", str(kept), "--model", str(kept / "model")])
    assert said.exit_code == 0, said.output
    assert "The update was skipped again" in said.output
    assert said.output.count("has non-finite log-probs") == 2
    well = CliRunner().invoke(app, ["replay", str(kept), "--model", str(base)])
    assert "The update was applied" in well.output, well.output


def test_what_is_wrong_is_told_in_one_line(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert torchrun.main(["rl"]) == 2
    assert "usage: torchrun" in capsys.readouterr().err
    assert torchrun.main(["sft", *given, f"data={tmp_path / 'none.jsonl'}"]) == 2
    assert "cannot read" in capsys.readouterr().err
    with pytest.raises(UserError, match="is not a directory"):
        torchrun.train_sft(load_config(SftRunConfig, None, [*given, f"model={tmp_path / 'none'}"]))
