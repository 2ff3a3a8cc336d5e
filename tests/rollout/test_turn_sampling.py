"""Turns whose reasoning quotes a zoom call."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from vz_ray.env.protocols import Prompt
from vz_ray.env.trajectory import SamplingParams, VersionSpan
from vz_ray.rollout.turn_sampling import sample_turn

CALL = '<video_zoom>{"segment": [1, 2], "fps": 1}</video_zoom>'
PROMPT = Prompt((1, 2), (), ())
REASONING_PROMPT = Prompt((1, 2), (), (), in_reasoning=True)


@dataclass
class ScriptedRequests:
    """Engine that stops after each `</video_zoom>` of a text; one token per word."""

    text: str
    requests: list[tuple[Prompt, SamplingParams, str]] = field(default_factory=list)

    async def run(self, prompt: Prompt, params: SamplingParams, text_before: str) -> Any:
        self.requests.append((prompt, params, text_before))
        rest = self.text.removeprefix(text_before)
        part = rest[: rest.find("</video_zoom>") + len("</video_zoom>")] if "</video_zoom>" in rest else rest
        ids = list(range(100, 100 + len(part.split())))[: params.max_tokens]
        is_call = part.endswith("</video_zoom>")
        finish_reason = "length" if len(ids) < len(part.split()) else "stop"
        completion = SimpleNamespace(
            token_ids=ids,
            text=part,
            logprobs=[{token: SimpleNamespace(logprob=-0.5)} for token in ids],
            weight_versions=[SimpleNamespace(start=0, end=len(ids), version=str(len(self.requests)))],
            finish_reason=finish_reason,
            stop_reason="</video_zoom>" if is_call and finish_reason == "stop" else None,
        )
        return SimpleNamespace(outputs=[completion])


async def sample(text: str, prompt: Prompt = REASONING_PROMPT, **params: Any) -> tuple[Any, ScriptedRequests]:
    engine = ScriptedRequests(text)
    return await sample_turn(prompt, SamplingParams(**params), engine.run), engine


@pytest.mark.parametrize("ending", [f"</think> {CALL}", "</think> <answer>B</answer>", " never closed"])
async def test_turn_continues_after_a_quoted_call(ending: str) -> None:
    text = f"I could write {CALL} or {CALL} then{ending}"
    action, engine = await sample(text, seed=7, max_tokens=100)
    words = text.split()
    assert len(action.token_ids) == len(action.logprobs) == len(words)
    assert action.stop_reason == ("zoom" if ending.endswith("</video_zoom>") else "end")
    assert len(engine.requests) == 3
    lengths = [span.end - span.start for span in action.versions]
    assert action.versions[0] == VersionSpan(0, lengths[0], 1)
    assert sum(lengths) == len(words)
    assert [span.start for span in action.versions] == [0, lengths[0], lengths[0] + lengths[1]]
    assert action.sampling_params == SamplingParams(seed=7, max_tokens=100)


async def test_continuation_appends_to_the_sampled_ids() -> None:
    action, engine = await sample(f"Maybe {CALL} or not </think> <answer>B</answer>", seed=7, max_tokens=50)
    (first, first_params, _), (second, second_params, text_before) = engine.requests
    count = len(second.compact_ids) - len(first.compact_ids)
    assert second.compact_ids == (*first.compact_ids, *action.token_ids[:count])
    assert text_before == f"Maybe {CALL}"
    assert second_params.max_tokens == first_params.max_tokens - count
    assert second_params.seed not in (None, first_params.seed)


async def test_call_after_the_reasoning_ends_the_turn() -> None:
    action, engine = await sample(f"Closer. </think> {CALL} {CALL}")
    assert (action.stop_reason, len(engine.requests)) == ("zoom", 1)


async def test_call_without_opened_reasoning_ends_the_turn() -> None:
    action, engine = await sample(f"<think> maybe {CALL} {CALL}", PROMPT)
    assert (action.stop_reason, len(engine.requests)) == ("zoom", 1)


@pytest.mark.parametrize("max_tokens", [7, 8])
async def test_token_limit_includes_continuations(max_tokens: int) -> None:
    text = f"Maybe {CALL} and more words here"
    action, _ = await sample(text, max_tokens=max_tokens)
    assert (len(action.token_ids), action.stop_reason) == (max_tokens, "length")


async def test_token_limit_at_a_quoted_call() -> None:
    text = f"Maybe {CALL} and more"
    action, engine = await sample(text, max_tokens=len(f"Maybe {CALL}".split()))
    assert (action.stop_reason, len(engine.requests)) == ("length", 1)
