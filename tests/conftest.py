"""Environment of all tests: few threads, quiet engines, a private Ray, and the devices of the GPU suite."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

# Set before torch, vLLM and Ray are imported, so that child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # otherwise each process compiles its imports again
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # on a GPU, vLLM compiles models for CUDA graphs
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip `@pytest.mark.gpu` and `@pytest.mark.gpu(2)` on a machine with fewer GPUs."""
    if (marker := item.get_closest_marker("gpu")) is None:
        return
    from tests.gpu_results import count_gpus

    needed = marker.args[0] if marker.args else 1
    if (available := count_gpus()) < needed:
        pytest.skip(f"needs {needed} CUDA GPU{'s'[: needed > 1]}; this machine has {available}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write the results of the GPU suite to `runs/gpu-check.json`, beside those of `vz-ray doctor --gpu`."""
    if "gpu" in report.keywords and not report.skipped and (report.when == "call" or report.failed):
        from tests.gpu_results import record_result

        record_result(report, Path("runs/gpu-check.json"))


CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(scope="module", params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and in the GPU suite the GPU."""
    import torch

    return torch.device(request.param)


@pytest.fixture(scope="module", params=["cpu", CUDA])
def default_device(request: pytest.FixtureRequest) -> torch.device:
    """The device that `Trainer` and `VllmEngine` use on this machine."""
    import torch

    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("Trainer and VllmEngine use this machine's GPU")
    return torch.device(request.param)


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """Private Ray of this test module with 4 logical CPUs."""
    import ray

    from vz_ray.runtime.ray_cluster import init_ray

    # Contains socket paths, which are limited to 107 characters; pytest's paths are too long.
    folder = tempfile.mkdtemp(prefix="vz_ray_")
    init_ray(address="local", num_cpus=4, include_dashboard=False, _temp_dir=folder, configure_logging=False)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """End torch's process group after each module, as DeepSpeed and vLLM keep references to the first group."""
    yield
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()  # for engines of the next module, which are other processes


@pytest.fixture(autouse=True)
def normal_priority() -> Iterator[None]:
    """Fail a test that leaves real-time priority behind: all later processes inherit it and block the machine."""
    yield
    if sys.platform == "linux":
        assert os.sched_getscheduler(0) == os.SCHED_OTHER, "the test changed this process's scheduling policy"


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    """Headless Playwright `Browser` with the system's Chromium (`apt-get install chromium`)."""
    executable = next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"no browser: install one of {', '.join(CHROMIUM_NAMES)} (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()
