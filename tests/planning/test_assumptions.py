"""Measured figures in place of assumptions, and files that do not belong to the planned GPU."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from vz_ray.jobs.gpu_checks import Gpu
from vz_ray.planning.assumptions import Assumptions, load_assumptions
from vz_ray.planning.gpu_figures import KNOWN_GPUS, find_gpu
from vz_ray.planning.gpu_memory import GIB
from vz_ray.utils.errors import UserError

H100 = "NVIDIA H100 80GB HBM3"


def write_check(file: Path, name: str = H100, *, count: int = 2, mig: bool = False, **changes: Any) -> Path:
    """Write a file as `vz-ray doctor --gpu` does, with the second GPU slower than the first."""
    gpus = [Gpu(index, name, 79.6, 78.0, mig, ()) for index in range(count)]
    devices = [
        {"index": i, "name": name, "capability": [9, 0], "tflops": t, "memory_gbps": 2600.0, "host_gbps": 52.0}
        for i, t in zip(range(count), (700.0, 623.07), strict=False)
    ]
    figures = {"devices": devices, "all_reduce": {"version": "2.27", "bus_gbps": 380.0}, **changes}
    file.write_text(json.dumps({"gpus": [asdict(gpu) for gpu in gpus], "figures": figures}))
    return file


def test_measured_figures_replace_assumptions(tmp_path: Path) -> None:
    assumptions, warnings = load_assumptions(write_check(tmp_path / "check.json"))
    assert warnings == []
    assert assumptions.gpu == H100
    assert assumptions.gpu_bytes == int(79.6 * GIB)
    # 0.9 of the matrix product that the assumption implies: 0.7 of the peak.
    assert assumptions.mfu == pytest.approx(0.9 * 0.35, abs=1e-3)
    assert assumptions.prefill_mfu == pytest.approx(0.9 * 0.4, abs=1e-3)
    assert assumptions.decode_share == pytest.approx(0.6 * 2600 / (0.85 * 3350))
    assert (assumptions.host_gbps, assumptions.node_gbps) == (52.0, 380.0)
    assert set(assumptions.measured) == {
        "gpu_bytes", "mfu", "prefill_mfu", "decode_share", "host_gbps", "node_gbps"
    }  # fmt: skip
    assert assumptions.measured_in == str(tmp_path / "check.json")


def test_one_gpu_has_no_measured_link(tmp_path: Path) -> None:
    file = write_check(tmp_path / "check.json", count=1, all_reduce={})
    assumptions, _ = load_assumptions(file)
    assert assumptions.node_gbps == Assumptions().node_gbps
    assert "node_gbps" not in assumptions.measured


def test_options_win_over_measured_figures(tmp_path: Path) -> None:
    file = write_check(tmp_path / "check.json")
    assumptions, warnings = load_assumptions(file, gpu="H100", gpu_memory="80GiB", mfu=0.5)
    assert warnings == []
    assert (assumptions.gpu_bytes, assumptions.mfu) == (80 * GIB, 0.5)
    assert not {"mfu", "gpu_bytes"} & set(assumptions.measured)
    assert "host_gbps" in assumptions.measured


def test_unknown_gpu_is_planned_from_its_figures(tmp_path: Path) -> None:
    assumptions, _ = load_assumptions(write_check(tmp_path / "check.json", "NVIDIA X1"))
    assert assumptions.gpu == "NVIDIA X1"
    assert assumptions.mfu * assumptions.peak_tflops == pytest.approx(0.5 * 623.07)
    assert assumptions.decode_share * assumptions.memory_gbps == pytest.approx(0.6 / 0.85 * 2600)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gpu": "A100-80GB"}, f"it measured {H100}, the plan is for A100-80GB"),
        ({"gpu_memory": "24GiB"}, f"it measured {H100} with 80 GiB, the plan is for 24 GiB"),
    ],
)
def test_file_of_another_gpu_is_ignored_with_one_line(tmp_path: Path, options: dict[str, str], reason: str) -> None:
    file = write_check(tmp_path / "check.json")
    assumptions, [warning] = load_assumptions(file, **options)
    assert (assumptions.measured, assumptions.measured_in) == ((), "")
    assert warning == f"{file} is ignored: {reason}. `vz-ray doctor --gpu` writes a new one."


def test_mig_slices_are_ignored_with_a_fix(tmp_path: Path) -> None:
    _, [warning] = load_assumptions(write_check(tmp_path / "check.json", mig=True))
    assert "GPU 0 was split into MIG slices; give a slice's memory with --gpu-memory" in warning


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"gpus": [], "figures": {"devices": []}}', '{"gpus": [], "figures": {"error": "hangs"}}'],
)
def test_unusable_file_is_ignored_with_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "check.json"
    file.write_text(text)
    assumptions, [warning] = load_assumptions(file)
    assert assumptions == Assumptions()
    assert warning.startswith(f"{file} is ignored: it has no valid figures of GPUs")
    assert "\n" not in warning


def test_missing_file_leaves_assumptions(tmp_path: Path) -> None:
    assert load_assumptions(tmp_path / "none.json") == (Assumptions(), [])


@pytest.mark.parametrize(
    ("product", "name"),
    [
        (H100, "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("A100", "A100-80GB"),
    ],
)
def test_product_names_match_data_sheets(product: str, name: str) -> None:
    spec = find_gpu(product)
    assert spec is not None
    assert spec.name == name


def test_unknown_gpu_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--gpu is 'H1000'; known are B200, H200, H100.* --gpu-memory"):
        load_assumptions(tmp_path / "none.json", gpu="H1000")
    assert find_gpu("") is None
    assert all(find_gpu(spec.name) is spec for spec in KNOWN_GPUS)
