"""Smallest real run: a random tiny model, two-minute videos, and all real components."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from vz_ray.config.data import SynthConfig
from vz_ray.data.episode_record import read_records
from vz_ray.needle.base_training import make_tokenizer_corpus
from vz_ray.needle.synthesis import synthesize
from vz_ray.needle.tiny_families import TINY_FAMILIES
from vz_ray.needle.tiny_model import build_tiny_model

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"train": 2, "sft": 1, "validation": 1, "test": 1}


@dataclass(frozen=True)
class SmallRun:
    """Videos, a base model, and the config overrides of a small run."""

    folder: Path
    family: str = "qwen2_5_vl"

    @classmethod
    def create(cls, folder: Path, family: str = "qwen2_5_vl") -> SmallRun:
        build_tiny_model(folder / "base", make_tokenizer_corpus(), family=family)
        side = 4 * TINY_FAMILIES[family].frame_side
        synthesize(SynthConfig(directory=str(folder / "needle"), shot_s=[4], side=side, workers=1, **SIZES))
        return cls(folder, family)

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def data(self, split: str) -> Path:
        return self.folder / "needle" / f"{split}.json"

    def overrides(self) -> list[str]:
        splits = [f"data.{split}={self.data(split)}" for split in SIZES]
        return [
            f"runs={self.runs}",
            f"model={self.folder / 'base'}",
            *splits,
            # Keep all groups: the rewards of a random model do not differ.
            "learner.loss.min_reward_std=0",
            "learner.cpus_per_rank=1",
            "train.batch_size=2",
            "train.max_sampled_tasks=2",
            "train.group_size=2",
            "train.checkpoint_every=1",
            "episode.max_turn_tokens=24",
            "rollout.engine.kv_cache_gib=0.25",
        ]

    def quickstart(self) -> list[str]:
        """Return the overrides of a small quickstart."""
        sizes = [f"synth.{split}={count}" for split, count in SIZES.items()]
        return [
            f"family={self.family}",
            *self.overrides(),
            *sizes,
            f"synth.directory={self.folder / 'needle'}",
            "synth.shot_s=[4]",
            "synth.workers=1",
            "train.max_steps=2",
            "cold_start.max_steps=2",
            "cold_start.batch_size=4",
            "baseline_sft.max_time_s=2",
            "baseline_sft.batch_size=4",
            "sft_continued.batch_size=4",
            "sft_continued.max_steps=4",
            "baseline.train_frames=[8]",
            "baseline.test_frames=[8,128]",
            "eval.bootstrap_resamples=100",
        ]


def start_vz_ray(*arguments: str) -> subprocess.Popen[str]:
    """Start `vz-ray` in a child process with its own process group."""
    command = [sys.executable, "-m", "vz_ray.cli", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_exit(process: subprocess.Popen[str], timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
    """Wait for the process; after the timeout, kill it with all descendants and fail."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        for running in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            running.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout_s} s; output: {out[-2000:]} {err[-2000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_vz_ray(*arguments: str, timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
    return wait_for_exit(start_vz_ray(*arguments), timeout_s)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 200) -> None:
    """Wait until `condition` holds; fail if `process` ends or the timeout expires."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"condition not met: {wait_for_exit(process, 1)}")
        time.sleep(0.05)


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return all descendants of a process."""
    return psutil.Process(process.pid).children(recursive=True)


def command_line(process: psutil.Process) -> str:
    """Return the command line of a process; empty if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def survivors(processes: list[psutil.Process], timeout_s: float = 20) -> list[str]:
    """Return the command lines of the processes that still run after the timeout."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return [" ".join(p.cmdline()) for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def send_signal(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> None:
    os.kill(process.pid, number)


def tasks_by_step(run: Path) -> list[set[str]]:
    """Return the task ids of each step; check that every sample was logged once."""
    steps = []
    for path in sorted((run / "episodes").glob("*.jsonl")):
        keys = [record.trajectory.id.sample_key for record in read_records(path)]
        assert len(keys) == len(set(keys))
        assert {key[0] for key in keys} == {int(path.stem)}
        steps.append({key[1] for key in keys})
    return steps
