"""Results of the GPU suite in the report file of `vz-ray doctor --gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gpu_results import record_result
from vz_ray.jobs.gpu_checks import update_gpu_report


def make_report(name: str, outcome: str, **details: object) -> pytest.TestReport:
    return pytest.TestReport(name, (name, 0, name), {"gpu": 1}, outcome, details.get("error"), "call", duration=1.234,
        user_properties=[("peak_gib", 2.5)])  # type: ignore[arg-type]  # fmt: skip


def test_results_are_added_beside_the_doctors_figures(tmp_path: Path) -> None:
    file = tmp_path / "runs" / "gpu-check.json"
    update_gpu_report(file, driver="580.65.06", tests={"results": {"old": {"outcome": "passed"}}})
    record_result(make_report("first", "passed"), file)
    record_result(make_report("second", "failed", error="Traceback\nE   AssertionError: 1.3"), file)
    body = json.loads(file.read_text())
    assert body["driver"] == "580.65.06"
    assert body["tests"]["results"] == {
        "old": {"outcome": "passed"},
        "first": {"outcome": "passed", "seconds": 1.23, "figures": {"peak_gib": 2.5}},
        "second": {
            "outcome": "failed",
            "seconds": 1.23,
            "figures": {"peak_gib": 2.5},
            "error": "E   AssertionError: 1.3",
        },
    }
    update_gpu_report(file, driver="590.1")
    assert json.loads(file.read_text())["tests"] == body["tests"]


def test_unreadable_report_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "gpu-check.json"
    file.write_text("{")
    update_gpu_report(file, driver="580.65.06")
    assert json.loads(file.read_text()) == {"driver": "580.65.06"}
