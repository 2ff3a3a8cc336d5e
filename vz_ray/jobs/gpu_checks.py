"""GPU checks of `vz-ray doctor --gpu`: driver, memory, other processes, MIG, kernels, peer access, NCCL, NVLink.

The state of the GPUs is read with `nvidia-smi`, which every driver installs. Kernels and collectives run in child
processes with a timeout, because a faulty GPU can block the process that uses it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vz_ray.monitoring.checks import CheckResult, CheckStatus
from vz_ray.utils.atomic_files import write_atomic

GIB = 1 << 30
MIN_GPU_GIB = 22.0
"""Memory of one GPU for the tests and the small recipes: a card of 24 GB."""
OTHER_PROCESS_GIB = 0.5
"""Memory of other processes above which a GPU counts as used."""
MIN_CAPABILITY = (8, 0)
"""bfloat16 and FlashAttention need Ampere or newer."""
DRIVER_OF_CUDA = {11: 450, 12: 525, 13: 580}
"""Oldest driver for each major version of CUDA."""
MEASUREMENTS = "vz_ray.learner.gpu_measurements"
"""Module of the child processes; not imported here, because it imports torch."""
SMI_TIMEOUT_S = 30.0
MEASURE_TIMEOUT_S = 180.0
KILL_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Gpu:
    """State of one GPU as the driver reports it.

    Attributes:
        index: Index in `nvidia-smi`.
        name: Product name.
        total_gib: Memory of the GPU.
        free_gib: Free memory.
        mig: Whether the GPU is split into MIG slices.
        processes: (process id, name, used GiB) of each compute process.
    """

    index: int
    name: str
    total_gib: float
    free_gib: float
    mig: bool
    processes: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True, slots=True)
class DriverReport:
    """What `nvidia-smi` reports: driver, newest CUDA version of the driver, GPUs, and the error if it failed."""

    driver: str
    cuda: str
    gpus: tuple[Gpu, ...]
    error: str = ""


def run_gpu_checks(report_file: Path) -> list[CheckResult]:
    """Run all GPU checks and write the measured figures to `report_file` as JSON. Takes up to a minute."""
    report = read_driver_report()
    build = measure("build")
    checks = [check_driver(report, str(build.get("cuda") or "")), check_torch_build(build)]
    for gpu in report.gpus:
        checks += [check_gpu_memory(gpu), *check_mig(gpu)]
    if any(check.status is CheckStatus.FAILED for check in checks):
        return checks
    figures = measure("devices")
    checks += check_devices(figures)
    if len(report.gpus) > 1:
        checks.append(check_links(read_topology()))
        figures["all_reduce"] = measure("all_reduce", str(len(report.gpus)))
        checks.append(check_nccl(figures["all_reduce"], len(report.gpus)))
    update_gpu_report(
        report_file,
        written=datetime.now(UTC).isoformat(timespec="seconds"),
        driver=report.driver,
        gpus=[asdict(gpu) for gpu in report.gpus],
        checks=[asdict(check) for check in checks],
        figures=figures,
    )
    return checks


def read_gpu_report(report_file: Path) -> dict[str, Any]:
    """Read a report file; return an empty report if it is missing or unreadable."""
    try:
        report = json.loads(report_file.read_text())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def update_gpu_report(report_file: Path, **sections: Any) -> None:
    """Replace sections of a report file and keep the others. The GPU test suite adds the section `tests`."""
    report_file.parent.mkdir(parents=True, exist_ok=True)
    report = read_gpu_report(report_file) | sections
    write_atomic(report_file, (json.dumps(report, indent=2) + "\n").encode())


def read_driver_report(command: Sequence[str] = ("nvidia-smi", "-q", "-x")) -> DriverReport:
    """Read driver and GPUs from `nvidia-smi`; errors are returned in the report."""
    ok, output = _run(command, SMI_TIMEOUT_S)
    if not ok:
        return DriverReport("", "", (), output)
    try:
        root = ElementTree.fromstring(output)
    except ElementTree.ParseError as error:
        return DriverReport("", "", (), f"unreadable output of {command[0]}: {error}")
    gpus = tuple(_parse_gpu(index, node) for index, node in enumerate(root.iter("gpu")))
    return DriverReport(root.findtext("driver_version", ""), root.findtext("cuda_version", ""), gpus)


def _parse_gpu(index: int, node: ElementTree.Element) -> Gpu:
    processes = tuple(
        (
            int(process.findtext("pid", "0")),
            Path(process.findtext("process_name", "") or "?").name,
            _gib(process.findtext("used_memory", "")),
        )
        for process in node.iter("process_info")
    )
    memory = node.find("fb_memory_usage")
    total, free = (_gib(memory.findtext(key, "")) if memory is not None else 0.0 for key in ("total", "free"))
    mig = node.findtext("mig_mode/current_mig", "") == "Enabled"
    return Gpu(index, node.findtext("product_name", "GPU"), total, free, mig, processes)


def _gib(text: str) -> float:
    """Convert nvidia-smi's `81559 MiB` to GiB; 0 for `N/A`."""
    match = re.match(r"([\d.]+) MiB", text)
    return float(match.group(1)) / 1024 if match else 0.0


def installed_torch_cuda() -> str:
    """Return torch's CUDA version without importing torch; empty for a CPU build or if torch is missing."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    try:
        text = Path(spec.origin).with_name("version.py").read_text()
    except OSError:
        return ""
    match = re.search(r"^cuda\b.*= '([\d.]+)'", text, flags=re.MULTILINE)
    return match.group(1) if match else ""


def check_driver(report: DriverReport, torch_cuda: str) -> CheckResult:
    """Check that a driver answers, lists GPUs, and is new enough for torch's CUDA version (empty: a CPU build)."""
    name = "GPU driver"
    if report.error:
        if "lost" in report.error or "Unable to determine the device handle" in report.error:
            fix = "a GPU fell off the bus: drain the node and reboot it; `dmesg | grep Xid` names the cause"
        else:
            fix = "install NVIDIA's driver, or give the container GPUs (docker run --gpus all, nvidia.com/gpu in a pod)"
        return CheckResult(name, CheckStatus.FAILED, report.error, fix)
    if not report.gpus:
        return CheckResult(
            name, CheckStatus.FAILED, f"driver {report.driver} lists no GPU", "check `lspci | grep NVIDIA`"
        )
    detail = f"{report.driver} (CUDA {report.cuda}), {len(report.gpus)} GPUs: {report.gpus[0].name}"
    if _major(report.cuda) < _major(torch_cuda):
        oldest = DRIVER_OF_CUDA.get(_major(torch_cuda), f"for CUDA {torch_cuda}")
        detail += f"; torch needs CUDA {torch_cuda}"
        return CheckResult(name, CheckStatus.FAILED, detail, f"install driver {oldest} or newer")
    return CheckResult(name, CheckStatus.OK, detail)


def check_torch_build(build: dict[str, object]) -> CheckResult:
    """Check that torch was built for CUDA; `build` has its version and CUDA version, or an error."""
    name, fix = "torch for CUDA", "in a new environment, run `pip install --no-deps -r requirements/gpu.lock`"
    if error := build.get("error"):
        return CheckResult(name, CheckStatus.FAILED, f"torch cannot be imported: {error}", fix)
    if cuda := build["cuda"]:
        return CheckResult(name, CheckStatus.OK, f"{build['version']}, CUDA {cuda}")
    return CheckResult(name, CheckStatus.FAILED, f"{build['version']} is a CPU build", fix)


def check_gpu_memory(gpu: Gpu, needed_gib: float = MIN_GPU_GIB) -> CheckResult:
    """Check the free memory of a GPU; name the processes that use it."""
    name = f"GPU {gpu.index} memory"
    detail = f"{gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB free"
    others = [f"process {pid} ({process}) uses {used:.1f} GiB" for pid, process, used in gpu.processes]
    used_gib = gpu.total_gib - gpu.free_gib
    if gpu.total_gib < needed_gib:
        fix = f"use a GPU of {needed_gib + 2:.0f} GB or more; `vz-ray plan` computes the memory of a recipe"
        return CheckResult(name, CheckStatus.FAILED, f"{detail}, {needed_gib:.0f} GiB needed", fix)
    if others or used_gib > max(OTHER_PROCESS_GIB, 0.05 * gpu.total_gib):
        share = max(0.1, gpu.free_gib / gpu.total_gib - 0.05)
        fix = f"stop the other process, or set rollout.engine.gpu_memory_utilization to {share:.2f}"
        status = CheckStatus.WARNING if gpu.free_gib >= needed_gib else CheckStatus.FAILED
        return CheckResult(name, status, "; ".join([detail, *others]), fix)
    return CheckResult(name, CheckStatus.OK, detail)


def check_mig(gpu: Gpu) -> list[CheckResult]:
    """Warn about MIG: slices have no peer access, so NCCL and IPC weight transfer do not work between them."""
    if not gpu.mig:
        return []
    fix = "set weights.transport to shm and use one slice per engine, or disable MIG (`nvidia-smi -mig 0`)"
    return [CheckResult(f"GPU {gpu.index} MIG", CheckStatus.WARNING, "split into slices without peer access", fix)]


def check_devices(figures: dict[str, object]) -> list[CheckResult]:
    """Judge the figures of `gpu_measurements.measure_devices`."""
    if error := figures.get("error"):
        fix = "see the message; a GPU that hangs needs a reset or a reboot of the node"
        return [CheckResult("GPU kernels", CheckStatus.FAILED, str(error), fix)]
    checks = []
    devices = figures["devices"]
    assert isinstance(devices, list)
    for device in devices:
        capability = tuple(device["capability"])
        detail = (
            f"{device['name']}: bf16 {device['tflops']:.0f} TFLOP/s, memory {device['memory_gbps']:.0f} GB/s,"
            f" from pinned host memory {device['host_gbps']:.0f} GB/s"
        )
        if capability < MIN_CAPABILITY:
            fix = "use Ampere (A100, RTX 30) or newer"
            detail += f"; compute capability {'.'.join(map(str, capability))} lacks bfloat16"
            checks.append(CheckResult(f"GPU {device['index']}", CheckStatus.FAILED, detail, fix))
        else:
            checks.append(CheckResult(f"GPU {device['index']}", CheckStatus.OK, detail))
    if missing := figures.get("pairs_without_peer_access"):
        assert isinstance(missing, list)
        detail = "no peer access between " + ", ".join(f"GPU {a} and {b}" for a, b in missing)
        fix = "IPC publishes copy through host memory there; check ACS in the BIOS and `nvidia-smi topo -p2p r`"
        checks.append(CheckResult("peer access", CheckStatus.WARNING, detail, fix))
    return checks


def check_nccl(figures: dict[str, Any], world_size: int) -> CheckResult:
    """Judge the figures of `gpu_measurements.measure_all_reduce`."""
    if error := figures.get("error"):
        fix = "run with NCCL_DEBUG=INFO; common causes: a small /dev/shm, a firewall on loopback, NCCL_SOCKET_IFNAME"
        return CheckResult("NCCL", CheckStatus.FAILED, str(error), fix)
    detail = f"{figures['version']}: all-reduce over {world_size} GPUs, {figures['bus_gbps']:.0f} GB/s"
    return CheckResult("NCCL", CheckStatus.OK, detail)


def read_topology(command: Sequence[str] = ("nvidia-smi", "topo", "-m")) -> dict[tuple[int, int], str]:
    """Return the link of each pair of GPUs: `NV18`, `PIX`, `PHB`, `SYS` and so on; empty if unknown."""
    ok, output = _run(command, SMI_TIMEOUT_S)
    lines = (re.sub(r"\x1b\[[\d;]*m", "", line).split() for line in output.splitlines() if ok)
    # The first columns are the GPUs; network cards and affinities follow. The header has no X.
    rows = [fields[1:] for fields in lines if fields and re.fullmatch(r"GPU\d+", fields[0]) and "X" in fields]
    return {(first, second): row[second] for first, row in enumerate(rows) for second in range(first + 1, len(rows))}


def check_links(links: dict[tuple[int, int], str]) -> CheckResult:
    """Report whether all pairs of GPUs are connected by NVLink."""
    if not links:
        return CheckResult("GPU links", CheckStatus.WARNING, "unknown", "run `nvidia-smi topo -m`")
    slow = {pair: link for pair, link in links.items() if not link.startswith("NV")}
    if not slow:
        return CheckResult("GPU links", CheckStatus.OK, f"NVLink between all pairs ({min(links.values())})")
    (first, second), link = next(iter(slow.items()))
    detail = f"{len(slow)} of {len(links)} pairs without NVLink, such as GPU {first} and {second} ({link})"
    fix = "keep rollout.engine.tensor_parallel_size within NVLink pairs; publishes and ZeRO-3 are slower over PCIe"
    return CheckResult("GPU links", CheckStatus.WARNING, detail, fix)


def measure(*arguments: str, timeout_s: float = MEASURE_TIMEOUT_S) -> dict[str, Any]:
    """Run `python -m vz_ray.learner.gpu_measurements` in a child process and return its figures or its error."""
    ok, output = _run([sys.executable, "-m", MEASUREMENTS, *arguments], timeout_s)
    lines = output.strip().splitlines() or ["no output"]
    if ok:
        return dict(json.loads(lines[-1]))
    return {"error": lines[-1]}


def _run(command: Sequence[str], timeout_s: float) -> tuple[bool, str]:
    """Run a command; return whether it succeeded, and its output or its error."""
    if shutil.which(command[0]) is None:
        return False, f"{command[0]} was not found"
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        # The whole group: the ranks of an all-reduce would keep their GPUs.
        os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process inside the driver cannot be killed
            process.wait(timeout=KILL_TIMEOUT_S)
        return False, f"{' '.join(command[:2])} did not finish within {timeout_s:g} s"
    if process.returncode == 0:
        return True, output
    return False, (errors.strip() or output.strip() or f"exit status {process.returncode}").splitlines()[-1]


def _major(version: str) -> int:
    return int(version.split(".")[0]) if version[:1].isdigit() else 0
