"""Requests with images survive that their caches are dropped.

Where a request begins on a cached prefix, vLLM 0.32 does not send the model's
process the images inside it. If the request is then preempted and its caches
are reset, as at every publish, the images must be encoded again: vLLM's V1
model runner has nothing to encode, and the whole engine dies. (The V2 runner is
sent the request anew.) So here all images are sent.
"""

from __future__ import annotations

from typing import Any


def keep_images() -> None:
    """Switches the omission off in this process, on platforms with the V1 runner; may be called again."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.core.sched import output

    if not callable(getattr(output, "strip_covered_mm_data", None)):
        raise RuntimeError("vLLM has no strip_covered_mm_data any more: see whether this fix is still needed")
    output.strip_covered_mm_data = _all


def _all(mm_features: list[Any], num_computed_tokens: int, uses_mrope: bool = False) -> list[Any]:
    return mm_features
