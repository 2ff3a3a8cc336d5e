"""Patches for two crashes of vLLM 0.32's CPU engine.

Both are in code paths that every run takes on CPU and none takes on GPUs. The vLLM plugin installs
them in the engine's processes.
"""

from __future__ import annotations

from typing import Any

import torch


def install_patches() -> None:
    """Install the patches in this process if it runs on CPU. Idempotent."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _keep_images()
        _rewind_seeds()


def _keep_images() -> None:
    """Keep the images of requests that start on a cached prefix.

    vLLM does not send images within a cached prefix to the model process. After a preemption with a
    cache reset, as at every publish, they must be encoded again, and the V1 model runner lacks them.
    (The V2 runner receives the complete request again.)
    """
    from vllm.v1.core.sched import output

    if not callable(getattr(output, "strip_covered_mm_data", None)):
        raise RuntimeError("vLLM has no strip_covered_mm_data: check whether this patch is still needed")
    output.strip_covered_mm_data = _all_images


def _all_images(mm_features: list[Any], num_computed_tokens: int, uses_mrope: bool = False) -> list[Any]:
    return mm_features


def _rewind_seeds() -> None:
    """Support seeded requests with chunked prefill.

    The sampler runs after each chunk, and vLLM reverts its draw by moving the generator's offset, which
    only CUDA generators have.
    """
    torch.Generator = RewindingGenerator  # type: ignore[misc]


class RewindingGenerator(torch.Generator):
    """CPU generator with an offset that can only be reset to the start.

    This is exact during prefill. A turn that repeats a chunked prefill after a publish draws from the
    start of its sequence again.
    """

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        return self.manual_seed(self.initial_seed())
