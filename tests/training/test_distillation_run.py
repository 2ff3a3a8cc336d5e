"""On-policy distillation end to end: real teacher engine, rollout, learner and publishes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.small_run import (
    SmallRun,
    command_line,
    descendants,
    run_vz_ray,
    start_vz_ray,
    wait_for_exit,
    wait_until,
)
from vz_ray.data.episode_record import read_records
from vz_ray.utils.resources import find_resource

pytestmark = [pytest.mark.slow, pytest.mark.integration, pytest.mark.timeout(900)]

ALONE = [
    "teacher.reward_weight=0",
    "train.temperature=0.85",
    "train.group_size=1",
    "teacher.max_concurrent_episodes=8",
    "teacher.engine.kv_cache_gib=0.25",
    "learner.loss.kl_coef=0",
    "learner.loss.entropy_coef=0",
]


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_student_is_its_own_teacher_at_first(tmp_path: Path, family: str) -> None:
    """The teacher's log-probs of real episodes equal the learner's: the KL of the first step is 0."""
    small = SmallRun.create(tmp_path, family)
    overrides = [*small.overrides(), *ALONE, f"teacher.model={tmp_path / 'base'}", "train.max_steps=1", "name=own"]
    frame = [f"episode.{bound}_pixels={784 if family == 'qwen2_5_vl' else 1024}" for bound in ("min", "max")]
    done = run_vz_ray("train", "conf/laptop.yaml", *overrides, *frame, timeout_s=800)
    assert done.returncode == 0, done.stderr
    (row,) = metrics_of(small.runs / "own")
    assert abs(row["teacher/kl"]) < 1e-5
    assert row["teacher/scored_token_rate"] == 1
    assert row["teacher/score_seconds"] > 0
    records = [record for path in (small.runs / "own" / "episodes").glob("*.jsonl") for record in read_records(path)]
    assert len(records) == 2
    for record in records:
        gaps = zip(record.trajectory.teacher_logprobs, record.trajectory.sampled_logprobs, strict=True)
        assert max(abs(teacher - student) for teacher, student in gaps) < 1e-4


def test_kl_to_a_trained_teacher_falls_although_its_worker_dies(tmp_path: Path) -> None:
    """A random student learns from the trained base; its rewards do not differ and do not count."""
    small = SmallRun.create(tmp_path)
    overrides = [
        *small.overrides(),
        *ALONE,
        f"teacher.model={find_resource('assets/tiny-base')}",
        "learner.loss.min_reward_std=0.1",
        "learner.optimizer.learning_rate=2e-3",
        "learner.optimizer.lr_schedule=constant",
        "learner.optimizer.warmup_ratio=0",
        "train.max_steps=3",
        "train.checkpoint_every=3",
        "name=distilled",
    ]
    run = small.runs / "distilled"
    process = start_vz_ray("train", "conf/laptop.yaml", *overrides)
    wait_until(lambda: (run / "metrics.jsonl").exists() and bool(metrics_of(run)), process, timeout_s=600)
    (teacher,) = (p for p in descendants(process) if command_line(p).startswith("ray::TeacherWorkerActor"))
    teacher.kill()
    done = wait_for_exit(process, timeout_s=600)
    assert done.returncode == 0, done.stderr
    assert (run / "logs" / "teacher-1.log").exists()
    kl = [row["teacher/kl"] for row in metrics_of(run)]
    assert len(kl) == 3
    assert kl[0] > 1
    assert kl[-1] < 0.7 * kl[0]
    assert [row["teacher/scored_token_rate"] for row in metrics_of(run)] == [1] * 3
