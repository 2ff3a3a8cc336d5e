"""Agent that follows directives in its question: the real engine with a forced sampler.

A question such as `{zoom 8 12 2} {zoom 20 24 1} {answer B}` has one turn per directive. `{think 40}` adds
40 words of reasoning to the next turn. `{quote B}` quotes an answer in reasoning that never ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from benchmarks.scripted_rollout import FORCED, ForcedTokens
from vz_ray.env.protocols import Prompt
from vz_ray.rollout.vllm_engine import VllmEngine
from vz_ray.serve.app import AgentReplica

DIRECTIVE = re.compile(r"\{(\w+)([^}]*)\}")


def parse_directives(question: str) -> list[str]:
    """Return the text of each turn."""
    turns, thought = [], "see"
    for directive, arguments in DIRECTIVE.findall(question):
        numbers = arguments.split()
        if directive == "think":
            thought = " ".join(["see"] * int(numbers[0]))
            continue
        if directive == "zoom":
            call: dict[str, Any] = {
                "segment": [float(numbers[0]), float(numbers[1])],
                "fps": float(numbers[2]),
            }
            if len(numbers) > 3:
                call = {"video": int(numbers[3]), **call}
            action = f"</think><video_zoom>{json.dumps(call)}</video_zoom>"
        elif directive == "quote":
            action = f" <answer>{arguments.strip()}</answer>"
        else:
            action = f"</think><answer>{arguments.strip()}</answer>"
        turns.append(f"<think>{thought}{action}")
        thought = "see"
    return turns


class DirectiveEngine(VllmEngine):
    """Engine with forced tokens for each turn of the last question with directives."""

    extra_logits_processors: ClassVar[Sequence[type]] = (ForcedTokens,)

    async def _generate(self, prompt: Prompt, params: Any, request_id: str, **options: Any) -> Any:
        questions = [message.text for message in prompt.messages if message.role == "user"]
        directed = [text for text in questions if DIRECTIVE.search(text)]
        turn = re.search(r"/turn(\d+)$", request_id)
        if directed and turn:
            turns = [*parse_directives(directed[-1]), "<think>see</think><answer>A</answer>"]
            text = turns[min(int(turn[1]), len(turns) - 1)]
            if prompt.in_reasoning:
                text = text.removeprefix("<think>")
            ids = self._encoder.encode(text, add_special_tokens=False)
            params.extra_args = {FORCED: [*ids, self._encoder.convert_tokens_to_ids("<|im_end|>")]}
        return await super()._generate(prompt, params, request_id, **options)

    @property
    def _encoder(self) -> Any:
        if not hasattr(self, "_tokenizer"):
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained("assets/tiny-base")
        return self._tokenizer


class DirectiveAgent(AgentReplica):
    """Agent replica with a `DirectiveEngine`."""

    engine_type = DirectiveEngine
