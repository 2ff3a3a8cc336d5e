"""Results of the GPU suite (`pytest -m gpu`) in the report file of `vz-ray doctor --gpu`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from vz_ray.jobs.gpu_checks import read_gpu_report, update_gpu_report


def count_gpus() -> int:
    """Return the number of CUDA GPUs of this machine."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def record_result(report: pytest.TestReport, file: Path) -> None:
    """Add outcome, seconds and figures (`record_property`) of a test to the section `tests`.

    The file is written after each test, so that an interrupted suite leaves its results.
    """
    result: dict[str, Any] = {"outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.user_properties:
        result["figures"] = dict(report.user_properties)
    if report.failed:
        result["error"] = report.longreprtext.strip().splitlines()[-1]
    results = read_gpu_report(file).get("tests", {}).get("results", {}) | {report.nodeid: result}
    section = {"written": datetime.now(UTC).isoformat(timespec="seconds"), "torch": _torch_version()}
    update_gpu_report(file, tests=section | {"gpus": _gpu_names(), "results": results})


def _torch_version() -> str:
    import torch

    return torch.__version__


def _gpu_names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(index) for index in range(count_gpus())]
