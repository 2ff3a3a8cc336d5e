"""An agent that does as its question says: the real engine, its sampler held to what is asked for.

A question such as `{zoom 8 12 2} {zoom 20 24 1} {answer B}` has one turn for each brace. `{think 40}` before
a turn adds that many words of reasoning to it.
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
    """What is to be said, turn by turn."""
    said, thought = [], "see"
    for order, words in DIRECTIVE.findall(question):
        numbers = words.split()
        if order == "think":
            thought = " ".join(["see"] * int(numbers[0]))
            continue
        if order == "zoom":
            call: dict[str, Any] = {
                "segment": [float(numbers[0]), float(numbers[1])],
                "fps": float(numbers[2]),
            }
            if len(numbers) > 3:
                call = {"video": int(numbers[3]), **call}
            act = f"<video_zoom>{json.dumps(call)}</video_zoom>"
        else:
            act = f"<answer>{words.strip()}</answer>"
        said.append(f"<think>{thought}</think>{act}")
        thought = "see"
    return said


class DirectiveEngine(VllmEngine):
    """The engine, told by each question what to say."""

    extra_logits_processors: ClassVar[Sequence[type]] = (ForcedTokens,)

    async def _generate(self, prompt: Prompt, params: Any, request: str, **how: Any) -> Any:
        questions = [message.text for message in prompt.messages if message.role == "user"]
        told = [text for text in questions if DIRECTIVE.search(text)]
        turn = re.search(r"/turn(\d+)$", request)
        if told and turn:
            said = [*parse_directives(told[-1]), "<think>see</think><answer>A</answer>"]
            words = said[min(int(turn[1]), len(said) - 1)]
            ids = self._encoder.encode(words, add_special_tokens=False)
            params.extra_args = {FORCED: [*ids, self._encoder.convert_tokens_to_ids("<|im_end|>")]}
        return await super()._generate(prompt, params, request, **how)

    @property
    def _encoder(self) -> Any:
        if not hasattr(self, "_tokenizer"):
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained("assets/tiny-base")
        return self._tokenizer


class DirectiveAgent(AgentReplica):
    """A replica with such an engine."""

    engine_type = DirectiveEngine
