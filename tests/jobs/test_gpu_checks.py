"""GPU checks of `vz-ray doctor --gpu`, with nvidia-smi replaced by a script and measurements on the host."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.jobs.nvidia_smi import GPU_XML, PROCESS_XML, smi_xml, write_smi
from vz_ray.jobs import gpu_checks
from vz_ray.jobs.gpu_checks import (
    Gpu,
    check_devices,
    check_driver,
    check_gpu_memory,
    check_links,
    check_mig,
    check_nccl,
)
from vz_ray.monitoring.checks import CheckStatus
from vz_ray.planning.gpu_figures import read_gpu_check

TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-31\t0\tN/A
GPU1\tNV18\t X \tSYS\tSYS\t0-31\t0\tN/A
GPU2\tSYS\tSYS\t X \tSYS\t32-63\t1\tN/A
NIC0\tPIX\tSYS\tSYS\t X

Legend:
  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
"""
FREE_GPU = Gpu(0, "NVIDIA H100", 79.6, 79.0, False, ())


@pytest.fixture
def smi(tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that makes a command with the given output and exit status."""

    def make(output: str, exit_status: int = 0) -> list[str]:
        return [str(write_smi(tmp_path, output, exit_status))]

    return make


def test_driver_report_lists_memory_processes_and_mig(smi):
    free = GPU_XML.format(index=0, mig="Disabled", used=0, free=81000, processes="")
    busy = GPU_XML.format(index=1, mig="Enabled", used=40960, free=40000, processes=PROCESS_XML)
    report = gpu_checks.read_driver_report(smi(smi_xml(free, busy)))
    assert (report.driver, report.cuda, report.error) == ("580.65.06", "13.0", "")
    assert [gpu.index for gpu in report.gpus] == [0, 1]
    assert report.gpus[0] == Gpu(0, "NVIDIA H100 80GB HBM3", 81559 / 1024, 81000 / 1024, False, ())
    assert report.gpus[1].mig
    assert report.gpus[1].processes == ((4711, "python", 40.0),)


def test_missing_driver_names_the_fix():
    report = gpu_checks.read_driver_report(["no-such-nvidia-smi"])
    check = check_driver(report, "13.0")
    assert check.status is CheckStatus.FAILED
    assert check.detail == "no-such-nvidia-smi was not found"
    assert "nvidia.com/gpu" in check.fix


def test_lost_gpu_is_named(smi):
    message = "Unable to determine the device handle for GPU0: 0000:3B:00.0: GPU is lost.  Reboot the system."
    check = check_driver(gpu_checks.read_driver_report(smi(message, exit_status=15)), "13.0")
    assert check.status is CheckStatus.FAILED
    assert check.detail == message
    assert "reboot" in check.fix


def test_hung_driver_times_out(tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\nexec sleep 60\n")
    command.chmod(0o755)
    monkeypatch.setattr(gpu_checks, "SMI_TIMEOUT_S", 0.5)
    assert "did not finish within 0.5 s" in gpu_checks.read_driver_report([str(command), "-q"]).error


def test_timeout_kills_the_whole_process_group(tmp_path, monkeypatch):
    pid_file = tmp_path / "pid"
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {pid_file}\nwait\n")
    command.chmod(0o755)
    monkeypatch.setattr(gpu_checks, "SMI_TIMEOUT_S", 3.0)
    assert "did not finish" in gpu_checks.read_driver_report([str(command), "-q"]).error
    grandchild = int(pid_file.read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(grandchild)
        deadline_s = time.monotonic() + 30
        while process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline_s, "the grandchild is still running"
            time.sleep(0.05)


def test_unreadable_output_is_an_error(smi):
    assert "unreadable output" in gpu_checks.read_driver_report(smi("<nvidia_smi_log>")).error


def test_no_gpu_is_a_failure(smi):
    check = check_driver(gpu_checks.read_driver_report(smi(smi_xml())), "13.0")
    assert check.status is CheckStatus.FAILED
    assert check.detail == "driver 580.65.06 lists no GPU"


@pytest.mark.parametrize(
    ("driver_cuda", "torch_cuda", "status"),
    [
        ("13.0", "13.0", CheckStatus.OK),
        ("13.1", "13.0", CheckStatus.OK),
        ("13.0", "13.2", CheckStatus.OK),  # minor versions are compatible
        ("13.0", "12.8", CheckStatus.OK),
        ("12.8", "13.0", CheckStatus.FAILED),
        ("12.8", "", CheckStatus.OK),
    ],
)
def test_driver_must_support_the_cuda_of_torch(smi, driver_cuda, torch_cuda, status):
    xml = smi_xml(GPU_XML.format(index=0, mig="N/A", used=0, free=81000, processes=""), cuda=driver_cuda)
    check = check_driver(gpu_checks.read_driver_report(smi(xml)), torch_cuda)
    assert check.status is status
    assert ("580 or newer" in check.fix) == (status is CheckStatus.FAILED)


def test_cpu_build_of_torch_is_a_failure():
    assert gpu_checks.check_torch_build({"version": "2.13.0", "cuda": "13.0"}).status is CheckStatus.OK
    check = gpu_checks.check_torch_build({"version": "2.13.0+cpu", "cuda": None})
    assert (check.status, check.detail) == (CheckStatus.FAILED, "2.13.0+cpu is a CPU build")
    assert "requirements/gpu.lock" in check.fix
    assert "libcudart" in gpu_checks.check_torch_build({"error": "libcudart.so.13 is missing"}).detail


def test_other_process_is_named_with_a_memory_share():
    assert check_gpu_memory(FREE_GPU).status is CheckStatus.OK
    check = check_gpu_memory(Gpu(1, "NVIDIA H100", 80.0, 40.0, False, ((4711, "python", 39.5),)))
    assert check.status is CheckStatus.WARNING
    assert check.detail == "40.0 of 80.0 GiB free; process 4711 (python) uses 39.5 GiB"
    assert "gpu_memory_utilization to 0.45" in check.fix


def test_too_little_memory_is_a_failure():
    assert check_gpu_memory(Gpu(0, "T4", 15.0, 15.0, False, ())).status is CheckStatus.FAILED
    # Another container's process is not listed, but its memory is missing.
    check = check_gpu_memory(Gpu(0, "NVIDIA H100", 80.0, 10.0, False, ()))
    assert check.status is CheckStatus.FAILED
    assert "stop the other process" in check.fix


def test_mig_slices_are_a_warning():
    assert check_mig(FREE_GPU) == []
    (check,) = check_mig(Gpu(0, "NVIDIA H100", 80.0, 80.0, True, ()))
    assert check.status is CheckStatus.WARNING


def test_topology_names_pairs_without_nvlink(smi):
    links = gpu_checks.read_topology(smi(TOPOLOGY))
    assert links == {(0, 1): "NV18", (0, 2): "SYS", (1, 2): "SYS"}
    check = check_links(links)
    assert check.status is CheckStatus.WARNING
    assert check.detail == "2 of 3 pairs without NVLink, such as GPU 0 and 2 (SYS)"
    assert check_links({(0, 1): "NV18"}).status is CheckStatus.OK
    assert check_links(gpu_checks.read_topology(smi("error", exit_status=1))).status is CheckStatus.WARNING


def test_device_figures_are_judged():
    device = {"index": 0, "name": "H100", "capability": [9, 0], "tflops": 700.0, "memory_gbps": 2900, "host_gbps": 52}
    (check,) = check_devices({"devices": [device], "pairs_without_peer_access": []})
    assert check.status is CheckStatus.OK
    assert "bf16 700 TFLOP/s" in check.detail
    old = device | {"capability": [7, 5]}
    checks = check_devices({"devices": [old], "pairs_without_peer_access": [[0, 1]]})
    assert [check.status for check in checks] == [CheckStatus.FAILED, CheckStatus.WARNING]
    assert "7.5 lacks bfloat16" in checks[0].detail
    (check,) = check_devices({"error": "CUDA error: an illegal memory access was encountered"})
    assert check.status is CheckStatus.FAILED


def test_failed_collective_is_reported():
    check = check_nccl({"error": "NCCL error: unhandled system error"}, 2)
    assert check.status is CheckStatus.FAILED
    assert "NCCL_DEBUG=INFO" in check.fix
    assert "120 GB/s" in check_nccl({"version": "2.29.7", "bus_gbps": 120.0}, 2).detail


def test_checks_stop_before_kernels_if_no_driver_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_checks, "read_driver_report", lambda: gpu_checks.DriverReport("", "", (), "not found"))
    measured: list[str] = []

    def measure(*arguments: str) -> dict[str, object]:
        measured.append(arguments[0])
        return {"version": "2.13.0", "cuda": "13.0"}

    monkeypatch.setattr(gpu_checks, "measure", measure)
    checks = gpu_checks.run_gpu_checks(tmp_path / "runs" / "gpu-check.json")
    assert measured == ["build"]
    assert [check.status for check in checks] == [CheckStatus.FAILED, CheckStatus.OK]
    assert not (tmp_path / "runs").exists()


def test_report_file_has_checks_and_figures(tmp_path, monkeypatch):
    report = gpu_checks.DriverReport("580.65.06", "13.0", (FREE_GPU, FREE_GPU))
    device = {"index": 0, "name": "H100", "capability": [9, 0], "tflops": 700.0, "memory_gbps": 2900, "host_gbps": 52}
    figures = {
        "build": {"version": "2.13.0", "cuda": "13.0"},
        "devices": {"devices": [device]},
        "all_reduce": {"version": "2.27.3", "bus_gbps": 400.0},
    }
    monkeypatch.setattr(gpu_checks, "read_topology", lambda: {(0, 1): "NV18"})
    monkeypatch.setattr(gpu_checks, "read_driver_report", lambda: report)
    monkeypatch.setattr(gpu_checks, "measure", lambda *arguments: figures[arguments[0]])
    checks = gpu_checks.run_gpu_checks(tmp_path / "runs" / "gpu-check.json")
    assert {check.status for check in checks} == {CheckStatus.OK}
    body = json.loads((tmp_path / "runs" / "gpu-check.json").read_text())
    assert body["figures"]["devices"][0]["tflops"] == 700.0
    assert len(body["checks"]) == len(checks)
    # The planner reads the same file.
    check = read_gpu_check(tmp_path / "runs" / "gpu-check.json")
    assert (check.gpu, check.tflops, check.bus_gbps) == ("H100", 700.0, 400.0)
    assert check.memory_bytes == int(FREE_GPU.total_gib * 2**30)


@pytest.mark.integration
def test_failed_measurement_returns_its_error():
    """On a machine without GPUs the child process fails, and its last line is the error."""
    assert gpu_checks.measure("build")["version"]
    assert "usage" in str(gpu_checks.measure("unknown")["error"])
    assert "did not finish within 0.01 s" in str(gpu_checks.measure("build", timeout_s=0.01)["error"])


def test_cuda_of_torch_is_read_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for line, cuda in (("cuda: Optional[str] = '13.0'", "13.0"), ("cuda: Optional[str] = None", "")):
        (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\nhip = None\n")
        assert gpu_checks.installed_torch_cuda() == cuda
