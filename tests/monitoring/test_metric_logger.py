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


def test_what_is_logged_is_read_back(tmp_path):
    write(tmp_path / "m.jsonl", range(3))
    rows = read_metrics(tmp_path / "m.jsonl")
    assert [(row["step"], row["reward/total"]) for row in rows] == [(0, 0.0), (1, 0.1), (2, 0.2)]


def test_a_line_is_on_disk_before_the_log_is_closed(tmp_path):
    log = MetricLogger(tmp_path / "m.jsonl")
    log.log(0, {"loss": 1.0})
    assert len(read_metrics(tmp_path / "m.jsonl")) == 1
    log.close()


def test_resuming_drops_lines_after_the_checkpoint(tmp_path):
    write(tmp_path / "m.jsonl", range(5))
    write(tmp_path / "m.jsonl", range(3, 4), resume_after=2)
    assert [row["step"] for row in read_metrics(tmp_path / "m.jsonl")] == [0, 1, 2, 3]


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, range(2))
    with open(path, "a") as file:
        file.write('{"step": 2, "rew')
    assert len(read_metrics(path)) == 2
    write(path, range(2, 3))
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"m.jsonl, line 2, is not a metrics line"):
        read_metrics(tmp_path / "m.jsonl")


def test_values_that_are_not_finite_keep_the_file_json(tmp_path):
    with MetricLogger(tmp_path / "m.jsonl") as log:
        log.log(0, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)
    (row,) = read_metrics(tmp_path / "m.jsonl")
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


def test_tensorboard_shows_the_same_scalars_and_forgets_dropped_steps(tmp_path):
    write(tmp_path / "m.jsonl", range(5), events=tmp_path / "tb")
    write(tmp_path / "m.jsonl", range(3, 4), events=tmp_path / "tb", resume_after=2)
    shown = EventAccumulator(str(tmp_path / "tb"))
    shown.Reload()
    assert [event.step for event in shown.Scalars("reward/total")] == [0, 1, 2, 3]
