"""What every test needs: few threads, quiet engines, and a Ray of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

# Before torch, vLLM or Ray are imported, so that their child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each process would compile its imports anew
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """A Ray of this module's own, with 4 logical CPUs, apart from any other on the machine."""
    import ray

    # Ray makes socket paths below it, which may have 107 characters at most: pytest's own paths are too long.
    folder = tempfile.mkdtemp(prefix="vz_ray_")
    ray.init(address="local", num_cpus=4, include_dashboard=False, _temp_dir=folder, configure_logging=False)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
