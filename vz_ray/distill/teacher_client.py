"""Client of the teacher model behind an OpenAI-compatible chat endpoint.

    generate(prompt)
        reply in the ledger                  -> that reply
        else a request, subject to the rate limits, `max_concurrency` and the budget (CostLimitReached)
             429, 5xx, timeout, connection,
             malformed reply                 -> retry with exponential backoff
             401, 403, 404                   -> UserError: every other request would fail too
             other statuses                  -> EndpointError
    EndpointError after `turn_timeout_s` of requests and backoff

The reply is cut after its first `</video_zoom>` and otherwise unchanged. The environment validates it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from blake3 import blake3

from vz_ray.config.distill import TeacherConfig
from vz_ray.distill.chat_messages import (
    TeacherPrompt,
    add_teacher_prompt,
    encode_content,
    estimate_prompt_tokens,
    truncate_to_one_turn,
)
from vz_ray.distill.cost_ledger import CostLedger, TeacherReply
from vz_ray.distill.rate_limiter import RateLimiter, SentRequest
from vz_ray.env.chat_format import VISION_PLACEHOLDERS, ChatFormat
from vz_ray.env.protocols import Prompt, PromptMessage
from vz_ray.env.trajectory import ExternalAction, SamplingParams
from vz_ray.utils.errors import UserError
from vz_ray.utils.openai_endpoint import ChatCompletion, ChatEndpoint, EndpointError, api_key_from_env

log = logging.getLogger(__name__)

_FATAL_STATUSES = {
    401: "Check the key in teacher.api_key_env.",
    403: "Check the key in teacher.api_key_env.",
    404: "Check teacher.model and teacher.base_url.",
}
"""Statuses that every further request would get too, and the fix."""
_CONTROL_TOKENS = (*VISION_PLACEHOLDERS, "<|im_start|>", "<|im_end|>", "<|endoftext|>")
"""Text that the tokenizer would encode as control tokens."""


class CostLimitReached(Exception):
    """The next request could exceed the budget and was not sent."""


class TeacherClient:
    """Client of the endpoint, shared by all episodes of a process.

    Args:
        config: Endpoint and limits.
        ledger: Ledger of replies and costs.
        check: Callback before each request; an exception prevents the request.

    Raises:
        UserError: The API key is not set.
    """

    def __init__(self, config: TeacherConfig, ledger: CostLedger, check: Callable[[], None] = lambda: None) -> None:
        self.config, self.ledger = config, ledger
        self._check = check
        self._endpoint = ChatEndpoint(config.base_url, teacher_api_key(config), config.request_timeout_s)
        self._rate_limiter = RateLimiter(config.requests_per_minute, config.tokens_per_minute)
        self._request_slots = asyncio.Semaphore(config.max_concurrency)
        self._request_finished = asyncio.Condition()
        self._token_ratio = 1.0  # maximum of reported to estimated prompt tokens

    async def complete(
        self,
        messages: Sequence[PromptMessage],
        sampling_params: SamplingParams,
        *,
        request_id: str,
        image_cache: dict[str, str],
    ) -> TeacherReply:
        """Return the completion of `messages`, from the ledger if it was received before.

        Args:
            messages: The conversation.
            sampling_params: Temperature, top-p and maximum tokens.
            request_id: Distinguishes requests with identical content.
            image_cache: Encoded images by frame; shared by the turns of an episode.

        Raises:
            EndpointError: The request failed.
            CostLimitReached: The request could exceed the budget.
            UserError: The endpoint rejects all requests.
        """
        key = self._request_key(messages, sampling_params, request_id)
        if (reply := self.ledger.get_reply(key)) is not None:
            return reply
        body = await asyncio.to_thread(self._build_body, messages, sampling_params, image_cache)
        prompt_tokens = estimate_prompt_tokens(messages, self.config.tokens_per_image)
        return await self._request_with_retries(key, body, (prompt_tokens, sampling_params.max_tokens))

    async def close(self) -> None:
        await self._endpoint.close()

    # -- request content ------------------------------------------------------------

    def _request_key(self, messages: Sequence[PromptMessage], sampling_params: SamplingParams, request_id: str) -> str:
        """Hash everything that determines the reply, and the request id."""
        contents = [[m.role, m.text, [frame.ref.digest for frame in m.frames]] for m in messages]
        sampling = [
            sampling_params.temperature,
            sampling_params.top_p,
            sampling_params.max_tokens,
            self.config.parameters,
        ]
        identity = [request_id, self.config.model, sampling, contents]
        return blake3(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def _build_body(
        self, messages: Sequence[PromptMessage], sampling_params: SamplingParams, image_cache: dict[str, str]
    ) -> dict[str, Any]:
        body = {
            "model": self.config.model,
            "messages": [
                {"role": m.role, "content": encode_content(m, self.config.image_format, image_cache)} for m in messages
            ],
            "temperature": sampling_params.temperature,
            "top_p": sampling_params.top_p,
            self.config.max_tokens_param: sampling_params.max_tokens,
            **self.config.parameters,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _cost_usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        input_cost = prompt_tokens * self.config.input_usd_per_mtok
        output_cost = completion_tokens * self.config.output_usd_per_mtok
        return (input_cost + output_cost) / 1e6

    # -- requests -------------------------------------------------------------------

    async def _request_with_retries(self, key: str, body: dict[str, Any], tokens: tuple[int, int]) -> TeacherReply:
        """Return the first completion. Raise the last error if no attempt or time remains.

        Waiting for a slot or a rate limit does not count towards the turn timeout.

        Args:
            key: Key in the ledger.
            body: Request body.
            tokens: Estimated prompt tokens and maximum completion tokens.
        """
        config, loop = self.config, asyncio.get_running_loop()
        remaining_s = config.turn_timeout_s
        for attempt in range(1, config.max_attempts + 1):
            async with self._request_slots:
                prompt_tokens = math.ceil(self._token_ratio * tokens[0])
                sent = await self._wait_for_rate_limit(prompt_tokens + tokens[1])
                await self._reserve_cost(key, self._cost_usd(prompt_tokens, tokens[1]))
                start_s = loop.time()
                try:
                    reply = await self._request(
                        key, body, (prompt_tokens, tokens[1]), min(config.request_timeout_s, remaining_s)
                    )
                except EndpointError as error:
                    if not (error.is_transient or error.reason == "malformed"):
                        raise
                    last_error = error
                else:
                    sent.tokens = reply.prompt_tokens + reply.completion_tokens
                    self._token_ratio = max(self._token_ratio, reply.prompt_tokens / tokens[0])
                    return reply
            log.info("Teacher request failed: %s, attempt %d: %s", config.model, attempt, last_error)
            wait_s = last_error.retry_delay_s(attempt, config.backoff_s)
            remaining_s -= loop.time() - start_s + wait_s
            if attempt == config.max_attempts or remaining_s <= 0:
                raise last_error
            await self._sleep(wait_s)
        raise AssertionError("every attempt returns or raises")

    async def _wait_for_rate_limit(self, tokens: int) -> SentRequest:
        loop = asyncio.get_running_loop()
        while (wait_s := self._rate_limiter.wait_time_s(loop.time(), tokens)) > 0:
            await self._sleep(wait_s)
        return self._rate_limiter.record_request(loop.time(), tokens)

    async def _sleep(self, seconds: float) -> None:
        """Sleep, and call `check` every second."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + seconds
        while (remaining_s := end_s - loop.time()) > 0:
            self._check()
            await asyncio.sleep(min(remaining_s, 1.0))

    async def _reserve_cost(self, key: str, usd: float) -> None:
        """Reserve the maximum cost. If the budget is short, wait for pending requests to release theirs."""
        async with self._request_finished:
            while True:
                self._check()
                if self.ledger.can_afford(usd):
                    self.ledger.reserve(key, usd)
                    return
                if not self.ledger.has_pending_requests:
                    raise CostLimitReached(f"the next request may cost ${usd:.4f}")
                await self._request_finished.wait()

    async def _request(self, key: str, body: dict[str, Any], tokens: tuple[int, int], timeout_s: float) -> TeacherReply:
        """Send one request and record its outcome in the ledger."""
        recorded = False
        try:
            reply = self._to_reply(await self._endpoint.complete(body, timeout_s), tokens)
            self.ledger.record_reply(key, reply)
            recorded = True
            return reply
        except EndpointError as error:
            if error.status:  # an error status is not charged
                self.ledger.record_rejection(key)
                recorded = True
            self._raise_if_fatal(error)
            raise
        finally:
            if not recorded:
                self.ledger.record_lost()
            async with self._request_finished:
                self._request_finished.notify_all()

    def _raise_if_fatal(self, error: EndpointError) -> None:
        if error.status in _FATAL_STATUSES:
            raise UserError(
                f"teacher {self.config.model} rejected the request with status {error.status} ({error.detail}). "
                f"{_FATAL_STATUSES[error.status]}"
            ) from error

    def _to_reply(self, completion: ChatCompletion, tokens: tuple[int, int]) -> TeacherReply:
        """Add the cost. If the server reports no usage, `tokens` counts."""
        prompt_tokens, completion_tokens = completion.token_counts or tokens
        return TeacherReply(
            completion.text,
            completion.finish_reason,
            prompt_tokens,
            completion_tokens,
            self._cost_usd(prompt_tokens, completion_tokens),
            usage_reported=completion.token_counts is not None,
        )


class TeacherPolicy:
    """The teacher as the `Policy` of one episode.

    Args:
        client: The endpoint.
        chat_format: Encodes the turns.
        prompt: Additional instructions for the teacher.
        prefix_turns: Turns of the policy before the teacher takes over.
    """

    def __init__(
        self, client: TeacherClient, chat_format: ChatFormat, prompt: TeacherPrompt, *, prefix_turns: int = 0
    ) -> None:
        self._client, self._chat_format = client, chat_format
        self._prompt, self._prefix_turns = prompt, prefix_turns
        self._image_cache: dict[str, str] = {}

    async def generate(self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str) -> ExternalAction:
        messages = add_teacher_prompt(prompt.messages, self._prompt, self._prefix_turns)
        reply = await self._client.complete(
            messages, sampling_params, request_id=request_id, image_cache=self._image_cache
        )
        text = truncate_to_one_turn(reply.text, reply.finish_reason)
        if control_token := next((token for token in _CONTROL_TOKENS if token in text), None):
            raise EndpointError("control token", f"the reply to {request_id} contains {control_token}")
        return ExternalAction(text, self._chat_format.encode_assistant(text))


def teacher_api_key(config: TeacherConfig) -> str:
    """Read the API key from the environment; raise `UserError` if it is not set."""
    return api_key_from_env(config.api_key_env, f"the teacher {config.model}", "teacher.api_key_env")
