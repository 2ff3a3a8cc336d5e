"""Patches for faults of vLLM 0.32's CPU engine: two crashes, and wrong experts after a publish.

All are in code paths that runs take on CPU and none takes on GPUs. The vLLM plugin installs them in the
engine's processes.
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
        _pack_reloaded_experts()


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


def _pack_reloaded_experts() -> None:
    """Pack the weights of experts after every load.

    The CPU kernel computes with packed weights. vLLM packs them after the first load only, and after a reload
    copies unpacked weights into the packed ones.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod as Method

    if Method.process_weights_after_loading is not _pack_after_loading:
        _pack_after_loading.original = Method.process_weights_after_loading  # type: ignore[attr-defined]
        Method.process_weights_after_loading = _pack_after_loading


def _pack_after_loading(method: Any, layer: Any) -> None:
    is_reload = method.moe_kernel is not None
    _pack_after_loading.original(method, layer)  # type: ignore[attr-defined]
    if is_reload:
        method.moe_kernel.fused_experts.process_weights_after_loading(layer)


class RewindingGenerator(torch.Generator):
    """CPU generator with an offset that can only be reset to the start.

    This is exact during prefill. A turn that repeats a chunked prefill after a publish draws from the
    start of its sequence again.
    """

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        return self.manual_seed(self.initial_seed())
