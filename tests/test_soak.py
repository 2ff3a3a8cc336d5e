"""Long run: no growth of memory, processes and files, and no leftovers."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster.local import LocalCluster
from tests.small_run import SmallRun, descendants, start_vz_ray, survivors, wait_for_exit, wait_until

STEPS, EARLY_STEPS = 300, 60
MAX_GROWTH_BYTES = {"memory/driver_bytes": 25e6, "memory/worker_bytes": 40e6, "memory/engine_bytes": 60e6}
"""Maximum growth from the early to the last steps, caused by allocators.
Leaking the trajectories of each step (12 episodes) would add 200 MB to the driver."""


@dataclass(frozen=True)
class Census:
    """Number of processes, file descriptors, objects and weight files of a run."""

    processes: int
    driver_fds: int
    objects: int
    weight_files: int

    @classmethod
    def take(cls, process: subprocess.Popen[str], cluster: LocalCluster, others: set[Path]) -> Census:
        command = [str(Path(sys.executable).with_name("ray")), "memory", "--stats-only"]
        result = subprocess.run(
            [*command, f"--address={cluster.address}"], capture_output=True, text=True, timeout=60, check=True
        )
        match = re.search(r"(\d+) objects", result.stdout)
        assert match, result.stdout
        processes = cluster.processes()
        weights = [path for store in weight_stores() - others for path in store.glob("*/*.bin")]
        return cls(len(processes), psutil.Process(process.pid).num_fds(), int(match[1]), len(weights))


def weight_stores() -> set[Path]:
    """Return the weight stores of all runs on this machine."""
    return set(Path("/dev/shm").glob("vz_ray_weights_*"))


def count_steps(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_long_run_does_not_leak(tmp_path: Path) -> None:
    small = SmallRun.create(tmp_path)
    folder = Path(tempfile.gettempdir()) / f"vzc{time.time_ns() % 10**8}"
    cluster = LocalCluster(max_nodes=1, cpus=2, head_cpus=6, port=6421, temp_dir=folder)
    cluster.up()
    others = weight_stores()
    try:
        process = start_vz_ray(
            "train",
            "conf/laptop.yaml",
            "name=soak",
            *small.overrides(),
            f"ray.address={cluster.address}",
            f"train.max_steps={STEPS}",
            "train.checkpoint_every=20",
            "train.batch_size=3",
            "train.max_sampled_tasks=3",
            "train.group_size=4",
            # Small enough to be touched completely early; pages touched later would look like a leak.
            "rollout.engine.kv_cache_gib=0.03",
        )
        metrics = small.runs / "soak/metrics.jsonl"
        wait_until(lambda: count_steps(metrics) >= EARLY_STEPS, process, 1200)
        early, started = Census.take(process, cluster, others), descendants(process)
        wait_until(lambda: count_steps(metrics) >= STEPS - 10, process, 3000)
        late = Census.take(process, cluster, others)
        result = wait_for_exit(process, 300)
        assert result.returncode == 0, result.stderr
        assert not survivors(started)
    finally:
        cluster.down()
    assert not cluster.processes()
    assert late.processes <= early.processes + 1, (early, late)
    assert late.driver_fds <= early.driver_fds + 4, (early, late)
    assert late.objects <= early.objects + 8, (early, late)
    assert late.weight_files <= early.weight_files + 2, (early, late)
    assert weight_stores() <= others

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert max(row["mismatch/logprob_abs_max"] for row in rows) <= 1e-4
    for name, limit in MAX_GROWTH_BYTES.items():
        first, last = (
            statistics.median(row[name] for row in window)
            for window in (rows[EARLY_STEPS : EARLY_STEPS + 40], rows[-40:])
        )
        print(f"{name}: {first:.3g} -> {last:.3g}")
        assert last - first <= limit, f"{name} grew from {first:.3g} to {last:.3g}"
