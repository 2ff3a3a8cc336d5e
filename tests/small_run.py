"""The smallest real run: a random tiny model, two-minute videos, every part the real one."""

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

from vz_ray.coldstart.base import corpus
from vz_ray.coldstart.tiny import build_tiny
from vz_ray.config.data import SynthConfig
from vz_ray.data.needle.synth import synthesize
from vz_ray.data.record import read_records

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"train": 2, "sft": 1, "validation": 1, "test": 1}


@dataclass(frozen=True)
class SmallRun:
    """Videos and a base, and the overrides that make a run of them small."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> SmallRun:
        build_tiny(folder / "base", corpus())
        synthesize(SynthConfig(directory=str(folder / "needle"), shot_s=[4], workers=1, **SIZES))
        return cls(folder)

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
            # Nothing is dropped: a random model's rewards do not differ.
            "learner.loss.min_reward_std=0",
            "train.tasks=2",
            "train.max_tasks=2",
            "train.samples=2",
            "train.checkpoint_every=1",
            "episode.max_turn_tokens=24",
            "rollout.engine.kv_cache_gib=0.25",
        ]

    def quickstart(self) -> list[str]:
        """Overrides of the quickstart besides those of any run."""
        sizes = [f"synth.{split}={count}" for split, count in SIZES.items()]
        return [
            *self.overrides(),
            *sizes,
            f"synth.directory={self.folder / 'needle'}",
            "synth.shot_s=[4]",
            "synth.workers=1",
            "train.iterations=2",
            "cold_start.steps=2",
            "cold_start.batch=4",
            "baseline_sft.max_seconds=2",
            "baseline_sft.batch=4",
            "sft_continued.batch=4",
            "sft_continued.steps=4",
            "baseline.train_frames=[8]",
            "baseline.test_frames=[8,128]",
            "evaluate.bootstrap=100",
        ]


def begin(*arguments: str) -> subprocess.Popen[str]:
    """Starts `vz-ray` in a process of its own, in a process group of its own."""
    command = [sys.executable, "-m", "vz_ray.cli", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str], seconds: float = 280) -> subprocess.CompletedProcess[str]:
    """Waits for its end; kills it and everything below it if that does not come."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        for below in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            below.kill()
        out, err = process.communicate()
        raise AssertionError(f"no end after {seconds} s; it said: {out[-2000:]} {err[-2000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def vz_ray(*arguments: str, seconds: float = 280) -> subprocess.CompletedProcess[str]:
    return finish(begin(*arguments), seconds)


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 200) -> None:
    """Waits until `what` holds while `process` runs."""
    until = time.monotonic() + seconds
    while not what():
        if process.poll() is not None or time.monotonic() > until:
            raise AssertionError(f"it did not come: {finish(process, 1)}")
        time.sleep(0.05)


def below(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Every process that `process` has started, directly or not."""
    return psutil.Process(process.pid).children(recursive=True)


def command_of(process: psutil.Process) -> str:
    """Its command line; empty if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def left_of(started: list[psutil.Process], seconds: float = 20) -> list[str]:
    """What still runs of these after a while."""
    _, alive = psutil.wait_procs(started, timeout=seconds)
    return [" ".join(p.cmdline()) for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def stop(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> None:
    os.kill(process.pid, number)


def tasks_by_iteration(run: Path) -> list[set[str]]:
    """Task ids of each iteration; every sample of each is there once."""
    found = []
    for path in sorted((run / "episodes").glob("*.jsonl")):
        owed = [record.trajectory.id.owed for record in read_records(path)]
        assert len(owed) == len(set(owed))
        assert {key[0] for key in owed} == {int(path.stem)}
        found.append({key[1] for key in owed})
    return found
