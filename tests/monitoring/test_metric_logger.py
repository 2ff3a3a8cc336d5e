"""Metric logger: JSON lines, TensorBoard events and resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vz_ray.monitoring.metric_logger import MetricLogger, read_metrics


def write(path: Path, steps: range, **options) -> None:
    with MetricLogger(path, **options) as log:
        for step in steps:
            log.log(step, {"reward/total": step / 10})


def test_logged_rows_are_read_back(tmp_path):
    write(tmp_path / "m.jsonl", range(3))
    rows = read_metrics(tmp_path / "m.jsonl")
    assert [(row["step"], row["reward/total"]) for row in rows] == [(0, 0.0), (1, 0.1), (2, 0.2)]


def test_row_is_on_disk_before_close(tmp_path):
    log = MetricLogger(tmp_path / "m.jsonl")
    log.log(0, {"loss": 1.0})
    assert len(read_metrics(tmp_path / "m.jsonl")) == 1
    log.close()


def test_resume_removes_rows_after_the_checkpoint(tmp_path):
    write(tmp_path / "m.jsonl", range(5))
    write(tmp_path / "m.jsonl", range(3, 4), resume_step=2)
    assert [row["step"] for row in read_metrics(tmp_path / "m.jsonl")] == [0, 1, 2, 3]


def test_truncated_last_line_is_removed(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, range(2))
    with open(path, "a") as file:
        file.write('{"step": 2, "rew')
    assert len(read_metrics(path)) == 2
    write(path, range(2, 3))
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2]


def test_invalid_line_is_named(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"m.jsonl, line 2: not a metrics row"):
        read_metrics(tmp_path / "m.jsonl")


def test_non_finite_values_keep_the_file_valid_json(tmp_path):
    with MetricLogger(tmp_path / "m.jsonl") as log:
        log.log(0, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)
    (row,) = read_metrics(tmp_path / "m.jsonl")
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


def test_tensorboard_discards_removed_steps(tmp_path):
    write(tmp_path / "m.jsonl", range(5), tensorboard_dir=tmp_path / "tb")
    write(tmp_path / "m.jsonl", range(3, 4), tensorboard_dir=tmp_path / "tb", resume_step=2)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward/total")] == [0, 1, 2, 3]
