"""Sampling of one turn, which may take several requests of the engine.

The engine stops at `</video_zoom>`. If the prompt opened the reasoning, a zoom call before `</think>` is only
quoted, so the turn is continued after it. The sampled ids stay as they are: the next request appends to them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeAlias

from vz_ray.env.protocols import Prompt
from vz_ray.env.trajectory import SampledAction, SamplingParams, VersionSpan
from vz_ray.env.zoom_call import REASONING_CLOSE
from vz_ray.rollout.vllm_requests import to_sampled_action

RequestRunner: TypeAlias = Callable[[Prompt, SamplingParams, str], Awaitable[Any]]
"""Runs one request: prompt, parameters, and the text of the turn before it. Returns vLLM's `RequestOutput`."""


async def sample_turn(prompt: Prompt, params: SamplingParams, run_request: RequestRunner) -> SampledAction:
    """Sample a turn up to its end token, its token limit, or a zoom call outside the reasoning."""
    output = await run_request(prompt, params, "")
    action, text = to_sampled_action(output, params), output.outputs[0].text
    while prompt.in_reasoning and action.stop_reason == "zoom" and REASONING_CLOSE not in text:
        num_tokens = len(action.token_ids)
        if num_tokens >= params.max_tokens:
            return replace(action, stop_reason="length")
        rest_params = replace(
            params,
            max_tokens=params.max_tokens - num_tokens,
            # The same seed would repeat the random numbers of the first request.
            seed=None if params.seed is None else params.seed + num_tokens,
        )
        rest_prompt = replace(prompt, compact_ids=(*prompt.compact_ids, *action.token_ids))
        output = await run_request(rest_prompt, rest_params, text)
        action = _join(action, to_sampled_action(output, rest_params))
        text += output.outputs[0].text
    return action


def _join(first: SampledAction, second: SampledAction) -> SampledAction:
    """Append a continuation to the beginning of a turn."""
    offset = len(first.token_ids)
    spans = (VersionSpan(span.start + offset, span.end + offset, span.version) for span in second.versions)
    return replace(
        first,
        token_ids=(*first.token_ids, *second.token_ids),
        logprobs=(*first.logprobs, *second.logprobs),
        versions=(*first.versions, *spans),
        stop_reason=second.stop_reason,
    )
