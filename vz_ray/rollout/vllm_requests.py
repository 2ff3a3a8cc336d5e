"""Conversion of prompts, sampling parameters and outputs between vz_ray and vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vz_ray.env.protocols import Prompt
from vz_ray.env.trajectory import SampledAction, SamplingParams, VersionSpan
from vz_ray.rollout.vllm_process import EngineFailedError
from vz_ray.video.frame import Frame

ZOOM_CALL_END = "</video_zoom>"
"""Stop string of a turn."""
ANSWER_END = "</answer>"
"""Stop string of a draft answer."""
_DRAFT_TOP_LOGPROBS = 20
"""Number of top log-probs per position of a draft; vLLM's default maximum."""


def frame_cache_key(frame: Frame) -> str:
    """Return the key of a frame in the engine's caches.

    The size is part of the key because the digest covers only bytes: black frames of 28 x 56 and 56 x 28
    have equal digests but different patches.
    """
    return f"{frame.ref.digest}-{frame.ref.width}x{frame.ref.height}"


def request_inputs(prompt: Prompt) -> dict[str, Any]:
    """Return the inputs of a request: token ids, and frames with their cache keys."""
    inputs: dict[str, Any] = {"prompt_token_ids": list(prompt.compact_ids)}
    if prompt.frames:
        inputs["multi_modal_data"] = {"image": [frame.rgb for frame in prompt.frames]}
        inputs["multi_modal_uuids"] = {"image": [frame_cache_key(frame) for frame in prompt.frames]}
    return inputs


def turn_params(sampling_params: SamplingParams, *, streaming: bool) -> Any:
    """Return `vllm.SamplingParams` of a turn; with `streaming`, outputs have the complete text so far."""
    import vllm
    from vllm.sampling_params import RequestOutputKind

    return vllm.SamplingParams(
        temperature=sampling_params.temperature,
        top_p=sampling_params.top_p,
        max_tokens=sampling_params.max_tokens,
        seed=sampling_params.seed,
        logprobs=0,
        stop=[ZOOM_CALL_END],
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        output_kind=RequestOutputKind.CUMULATIVE if streaming else RequestOutputKind.FINAL_ONLY,
    )


def draft_params(max_tokens: int, logprob_token_ids: Sequence[int]) -> Any:
    """Return `vllm.SamplingParams` of a draft answer: greedy, log-probs of the given or the top tokens."""
    import vllm
    from vllm.sampling_params import RequestOutputKind

    return vllm.SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        logprobs=None if logprob_token_ids else _DRAFT_TOP_LOGPROBS,
        logprob_token_ids=list(logprob_token_ids) or None,
        stop=[ANSWER_END],
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def to_sampled_action(output: Any, sampling_params: SamplingParams) -> SampledAction:
    """Convert the `RequestOutput` of a turn.

    Raises:
        EngineFailedError: The turn ended for another reason than a stop or the token limit.
    """
    completion = output.outputs[0]
    ids = tuple(completion.token_ids)
    return SampledAction(
        token_ids=ids,
        logprobs=tuple(logprobs[token].logprob for token, logprobs in zip(ids, completion.logprobs or (), strict=True)),
        versions=tuple(
            VersionSpan(span.start, span.end, int(span.version)) for span in completion.weight_versions or ()
        ),
        sampling_params=sampling_params,
        stop_reason=_stop_reason(completion.finish_reason, completion.stop_reason),
    )


def _stop_reason(finish_reason: str | None, stop_reason: int | str | None) -> str:
    """Convert vLLM's reasons to `SampledAction.stop_reason`."""
    if finish_reason == "length":
        return "length"
    if finish_reason == "stop":
        return "zoom" if stop_reason == ZOOM_CALL_END else "end"
    raise EngineFailedError(f"a turn ended with finish reason {finish_reason!r}")
