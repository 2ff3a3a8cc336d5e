"""Two things in vLLM 0.32's CPU engine that would end it in the middle of a run.

Both are in paths that this project takes all the time, and neither is taken
on GPUs. Installed in the engine's processes through the plugin.
"""

from __future__ import annotations

from typing import Any

import torch


def install_patches() -> None:
    """Installs both in this process if its engine computes on CPU; may be called again."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _keep_images()
        _rewind_seeds()


def _keep_images() -> None:
    """Requests with images survive that their caches are dropped.

    Where a request begins on a cached prefix, the model's process is not sent
    the images inside it. If the request is then preempted and its caches are
    reset, as at every publish, they must be encoded again, and the V1 model
    runner has nothing to encode. (The V2 runner is sent the request anew.)
    """
    from vllm.v1.core.sched import output

    if not callable(getattr(output, "strip_covered_mm_data", None)):
        raise RuntimeError("vLLM has no strip_covered_mm_data any more: see whether this is still needed")
    output.strip_covered_mm_data = _all_images


def _all_images(mm_features: list[Any], num_computed_tokens: int, uses_mrope: bool = False) -> list[Any]:
    return mm_features


def _rewind_seeds() -> None:
    """Seeded requests survive that their prompt is read in parts.

    The sampler runs after each part and its draw is taken back by moving the
    generator's offset, which only CUDA generators have.
    """
    torch.Generator = RewindingGenerator  # type: ignore[misc]


class RewindingGenerator(torch.Generator):
    """A CPU generator that can take back what it drew: from its start.

    That is exact while a prompt is read. A turn that reads its prompt again
    after a publish, in parts, draws from the start once more.
    """

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        return self.manual_seed(self.initial_seed())
