"""A long run: nothing grows, and nothing is left."""

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

ITERATIONS, EARLY = 300, 60
MOST_MB = {"memory/driver_bytes": 25, "memory/worker_bytes": 40, "memory/engine_bytes": 60}
"""Growth from the early to the last iterations that is put up with: allocators, not leaks.
Leaking one iteration's trajectories (12 episodes' ids and references) would be 200 MB in the driver."""


@dataclass(frozen=True)
class Census:
    """What a run holds at one moment."""

    processes: int
    driver_fds: int
    objects: int
    weight_files: int

    @classmethod
    def take(cls, process: subprocess.Popen[str], cluster: LocalCluster, others: set[Path]) -> Census:
        command = [str(Path(sys.executable).with_name("ray")), "memory", "--stats-only"]
        found = subprocess.run(
            [*command, f"--address={cluster.address}"], capture_output=True, text=True, timeout=60, check=True
        )
        match = re.search(r"(\d+) objects", found.stdout)
        assert match, found.stdout
        everyone = cluster.processes()
        weights = [path for store in stores() - others for path in store.glob("*/*.bin")]
        return cls(len(everyone), psutil.Process(process.pid).num_fds(), int(match[1]), len(weights))


def stores() -> set[Path]:
    """Where runs on this machine have their weights."""
    return set(Path("/dev/shm").glob("vz_ray_weights_*"))


def steps(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_three_hundred_iterations_leave_memory_processes_and_files_as_they_were(tmp_path: Path) -> None:
    small = SmallRun.create(tmp_path)
    folder = Path(tempfile.gettempdir()) / f"vzc{time.time_ns() % 10**8}"
    cluster = LocalCluster(max_nodes=1, cpus=2, head_cpus=6, port=6421, temp_dir=folder)
    cluster.up()
    others = stores()
    try:
        process = start_vz_ray(
            "train",
            "conf/tiny.yaml",
            "name=soak",
            *small.overrides(),
            f"ray.address={cluster.address}",
            f"train.max_steps={ITERATIONS}",
            "train.checkpoint_every=20",
            "train.batch_size=3",
            "train.max_sampled_tasks=3",
            "train.group_size=4",
            # All of it has been written to early: pages that are touched later would look like a leak.
            "rollout.engine.kv_cache_gib=0.03",
        )
        metrics = small.runs / "soak/metrics.jsonl"
        wait_until(lambda: steps(metrics) >= EARLY, process, 1200)
        early, started = Census.take(process, cluster, others), descendants(process)
        wait_until(lambda: steps(metrics) >= ITERATIONS - 10, process, 3000)
        late = Census.take(process, cluster, others)
        done = wait_for_exit(process, 300)
        assert done.returncode == 0, done.stderr
        assert not survivors(started)
    finally:
        cluster.down()
    assert not cluster.processes()
    assert late.processes <= early.processes + 1, (early, late)
    assert late.driver_fds <= early.driver_fds + 4, (early, late)
    assert late.objects <= early.objects + 8, (early, late)
    assert late.weight_files <= early.weight_files + 2, (early, late)
    assert stores() <= others

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(ITERATIONS))
    assert max(row["mismatch/logprob_abs_max"] for row in rows) <= 1e-4
    for name, most in MOST_MB.items():
        first, last = (
            statistics.median(row[name] for row in part) for part in (rows[EARLY : EARLY + 40], rows[-40:])
        )
        print(f"{name}: {first:.1f} -> {last:.1f}")
        assert last - first <= most, f"{name} grew from {first:.1f} to {last:.1f}"
