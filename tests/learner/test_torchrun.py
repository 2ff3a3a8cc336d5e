"""SFT under torchrun with real videos on one and two ranks."""

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
from vz_ray.data.chat_format_loader import load_chat_format
from vz_ray.data.episode_record import EpisodeRecord, append_records
from vz_ray.data.task_file import read_tasks
from vz_ray.learner import torchrun
from vz_ray.learner.trainer import Trainer
from vz_ray.needle.exemplars import collect_exemplars, zoom_oracle_factory
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import StopRequested
from vz_ray.utils.step_dirs import list_steps

QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Config overrides of a run of three steps on real episodes."""
    small = SmallRun.create(tmp_path_factory.mktemp("alone"))
    exemplars, base = small.folder / "exemplars.jsonl", small.folder / "base"
    episode = {"prompt": "conf/prompt/tiny.yaml", "min_pixels": 784, "max_pixels": 784, "max_context": 2048}
    learner = {"zero_stage": 2, "loss.kl_coef": 0, "optimizer.epsilon": 1e-3}
    values = [
        *(f"episode.{key}={value}" for key, value in episode.items()),
        *(f"learner.{key}={value}" for key, value in learner.items()),
        *("sft.max_steps=3", "sft.batch_size=2", "sft.lr_schedule=cosine"),
        *(f"runs={small.runs}", f"model={base}", f"data={exemplars}"),
    ]
    config = load_config(SftRunConfig, None, [f"episode.{key}={value}" for key, value in episode.items()])
    chat_format, tasks = load_chat_format(base, config.episode), read_tasks(small.data("sft"))
    with torchrun.LocalFrameSource() as frames:
        trajectories = asyncio.run(
            collect_exemplars(tasks, frames, chat_format, config.episode, zoom_oracle_factory(chat_format))
        )
    append_records(exemplars, [EpisodeRecord(*pair) for pair in zip(tasks, trajectories, strict=True)])
    return values


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "models" / "policy" / "model.safetensors")


@pytest.fixture(scope="module")
def single_rank_run(overrides: list[str]) -> Path:
    """A run on one rank in this process."""
    return torchrun.train_sft(load_config(SftRunConfig, None, [*overrides, "name=single_rank_run"])).parent.parent


def test_two_torchrun_ranks_match_one_without_ray_and_vllm(
    overrides: list[str], single_rank_run: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*command, "-m", "tests.learner.torchrun_worker", str(tmp_path), "sft", *overrides, "name=two"],
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
    two = single_rank_run.parent / "two"
    assert f"the policy is in {two / 'models' / 'policy'}" in ended.stdout.replace("\n", "")
    rows, expected = (
        [json.loads(line) for line in (run / "policy.jsonl").read_text().splitlines()] for run in (two, single_rank_run)
    )
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-4)
    for name, value in weights(single_rank_run).items():
        np.testing.assert_allclose(weights(two)[name], value, atol=2e-6, rtol=0, err_msg=name)


def test_stopped_run_resumes(overrides: list[str], single_rank_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a SIGTERM during the first step, the step is saved and the final weights are equal."""
    config = load_config(SftRunConfig, None, [*overrides, "name=stopped"])
    step = Trainer.sft_step
    calls = []

    def stopped(self: Trainer, *args: Any) -> dict[str, float]:
        if not calls:
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(1)
        return step(self, *args)

    monkeypatch.setattr(Trainer, "sft_step", stopped)
    with pytest.raises(StopRequested):
        torchrun.train_sft(config)
    run = single_rank_run.parent / "stopped"
    assert len(calls) == 1
    assert not (run / "models").exists()
    (checkpoint,) = list_steps(run / "checkpoints" / "policy")
    assert json.loads((checkpoint / "sft.json").read_text())["steps"] == 1
    assert torchrun.train_sft(config) == run / "models" / "policy"
    assert len(calls) == 3
    for name, value in weights(single_rank_run).items():
        assert np.array_equal(weights(run)[name], value), name


def test_non_finite_weights_end_the_run_and_can_be_replayed(
    overrides: list[str], single_rank_run: Path, tmp_path: Path
) -> None:
    """`vz-ray replay` decodes the frames of the saved batch from the videos."""
    from safetensors.numpy import save_file
    from typer.testing import CliRunner

    from vz_ray.cli import app

    base = Path(next(text for text in overrides if text.startswith("model=")).removeprefix("model="))
    broken = shutil.copytree(base, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] *= np.float32(3e38)  # the final norm, under its name in HF files
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    config = load_config(
        SftRunConfig, None, [*overrides, f"model={broken}", "learner.max_skipped_updates=2", "name=broken"]
    )
    saved_batch = (single_rank_run.parent / "broken" / "replay" / "step-000000-2").resolve()
    with pytest.raises(UserError, match=f"2 updates in a row .* are in {saved_batch}"):
        torchrun.train_sft(config)
    assert not (single_rank_run.parent / "broken" / "models").exists()
    shutil.rmtree(broken)
    result = CliRunner().invoke(app, ["replay", str(saved_batch), "--model", str(saved_batch / "model")])
    assert result.exit_code == 0, result.output
    assert "The update was skipped again" in result.output
    assert result.output.count("has non-finite log-probs") == 2
    result = CliRunner().invoke(app, ["replay", str(saved_batch), "--model", str(base)])
    assert "The update was applied" in result.output, result.output


def test_user_errors_print_one_line(overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert torchrun.main(["rl"]) == 2
    assert "usage: torchrun" in capsys.readouterr().err
    assert torchrun.main(["sft", *overrides, f"data={tmp_path / 'none.jsonl'}"]) == 2
    assert "cannot read" in capsys.readouterr().err
    with pytest.raises(UserError, match="is not a directory"):
        torchrun.train_sft(load_config(SftRunConfig, None, [*overrides, f"model={tmp_path / 'none'}"]))
