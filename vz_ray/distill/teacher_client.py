"""Client of the teacher model behind an OpenAI-compatible chat endpoint.

    generate(prompt)
        reply in the ledger                  -> that reply
        else a request, subject to the rate limits, `max_concurrency` and the budget (CostLimitReached)
             429, 5xx, timeout, connection,
             malformed reply                 -> retry with exponential backoff
             401, 403, 404                   -> UserError: every other request would fail too
             other statuses                  -> TeacherError
    TeacherError after `turn_timeout_s` of requests and backoff

The reply is cut after its first `</video_zoom>` and otherwise unchanged. The environment validates it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

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
from vz_ray.utils.openai_endpoint import api_key_from_env, retry_after_s
from vz_ray.utils.timeouts import StepTimeout, with_timeout

if TYPE_CHECKING:
    from openai import AsyncOpenAI

log = logging.getLogger(__name__)

_RETRYABLE_STATUSES = (408, 409, 425, 429)
"""Retryable statuses below 500."""
_FATAL_STATUSES = {
    401: "Check the key in teacher.api_key_env.",
    403: "Check the key in teacher.api_key_env.",
    404: "Check teacher.model and teacher.base_url.",
}
"""Statuses that every further request would get too, and the fix."""
_MAX_BACKOFF_S = 60.0
_CONTROL_TOKENS = (*VISION_PLACEHOLDERS, "<|im_start|>", "<|im_end|>", "<|endoftext|>")
"""Text that the tokenizer would encode as control tokens."""


class TeacherError(Exception):
    """A turn failed.

    Attributes:
        reason: Kind of failure: `timeout`, `connection`, `status 500`, `malformed`, `control token`.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class CostLimitReached(Exception):
    """The next request could exceed the budget and was not sent."""


class _RetryableTeacherError(TeacherError):
    """Retryable failure. `retry_after_s` is the minimum delay that the server requests."""

    def __init__(self, reason: str, detail: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason, detail)
        self.retry_after_s = retry_after_s


class _RequestRejected(Exception):
    """The server rejected a request without a charge; `error` is the exception to raise."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


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
        self._key = teacher_api_key(config)
        self._rate_limiter = RateLimiter(config.requests_per_minute, config.tokens_per_minute)
        self._request_slots = asyncio.Semaphore(config.max_concurrency)
        self._request_finished = asyncio.Condition()
        self._client: AsyncOpenAI | None = None
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
            TeacherError: The request failed.
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
        if self._client is not None:
            await self._client.close()
            self._client = None

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
                except _RetryableTeacherError as error:
                    last_error = error
                else:
                    sent.tokens = reply.prompt_tokens + reply.completion_tokens
                    self._token_ratio = max(self._token_ratio, reply.prompt_tokens / tokens[0])
                    return reply
            log.info("Teacher request failed: %s, attempt %d: %s", config.model, attempt, last_error)
            backoff_s = config.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
            wait_s = max(min(backoff_s, _MAX_BACKOFF_S), last_error.retry_after_s)
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
            reply = self._parse_reply(await self._send(body, timeout_s), tokens)
            self.ledger.record_reply(key, reply)
            recorded = True
            return reply
        except _RequestRejected as rejection:
            self.ledger.record_rejection(key)
            recorded = True
            raise rejection.error from rejection
        finally:
            if not recorded:
                self.ledger.record_lost()
            async with self._request_finished:
                self._request_finished.notify_all()

    async def _send(self, body: dict[str, Any], timeout_s: float) -> Any:
        """Send a request; return the response.

        Raises:
            _RequestRejected: The server returned an error status.
            _RetryableTeacherError: The server returned no usable response.
        """
        import openai

        base_url = self.config.base_url
        try:
            return await with_timeout(self._create(body), timeout_s, target=base_url, operation="a chat completion")
        except (StepTimeout, openai.APITimeoutError) as error:
            raise _RetryableTeacherError("timeout", str(error)) from error
        except openai.APIConnectionError as error:
            raise _RetryableTeacherError("connection", f"{base_url}: {error.__cause__ or error}") from error
        except openai.APIStatusError as error:
            raise _RequestRejected(self._status_error(error)) from error
        except (openai.APIError, ValueError) as error:
            raise _RetryableTeacherError("malformed", f"{base_url}: {error}") from error

    def _status_error(self, error: Any) -> Exception:
        status, config = int(error.status_code), self.config
        reason, detail = f"status {status}", f"{config.base_url}: {error.message[:200]}"
        if status in _FATAL_STATUSES:
            return UserError(
                f"teacher {config.model} rejected the request with status {status} ({detail}). "
                f"{_FATAL_STATUSES[status]}"
            )
        if status in _RETRYABLE_STATUSES or status >= 500:
            return _RetryableTeacherError(reason, detail, retry_after_s(error.response.headers))
        return TeacherError(reason, detail)

    def _create(self, body: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        from openai import AsyncOpenAI

        if self._client is None:
            self._client = AsyncOpenAI(
                api_key=self._key,
                base_url=self.config.base_url,
                timeout=self.config.request_timeout_s,
                max_retries=0,  # the ledger accounts for each retry
            )
        create: Any = self._client.chat.completions.create
        required = {name: body[name] for name in ("model", "messages")}
        extra_body = {name: value for name, value in body.items() if name not in required}
        request: Coroutine[Any, Any, Any] = create(**required, extra_body=extra_body)
        return request

    def _parse_reply(self, response: Any, tokens: tuple[int, int]) -> TeacherReply:
        """Parse a completion. Missing text (content filter, refusal) becomes an empty reply.

        Raises:
            _RetryableTeacherError: The response is malformed.
        """
        model = self.config.model
        try:
            choice = response.choices[0]
            text, finish_reason = choice.message.content or "", str(choice.finish_reason or "")
        except (AttributeError, IndexError, TypeError) as error:
            raise _RetryableTeacherError("malformed", f"{model} replied {str(response)[:120]!r}") from error
        if not isinstance(text, str):
            raise _RetryableTeacherError("malformed", f"{model} returned no text: {str(text)[:120]!r}")
        usage = getattr(response, "usage", None)
        counts = (getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None))
        reported = all(isinstance(count, int) and count >= 0 for count in counts)
        prompt_tokens, completion_tokens = counts if reported else tokens
        assert isinstance(prompt_tokens, int)
        assert isinstance(completion_tokens, int)
        cost_usd = self._cost_usd(prompt_tokens, completion_tokens)
        return TeacherReply(text, finish_reason, prompt_tokens, completion_tokens, cost_usd, reported)


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
            raise TeacherError("control token", f"the reply to {request_id} contains {control_token}")
        return ExternalAction(text, self._chat_format.encode_assistant(text))


def teacher_api_key(config: TeacherConfig) -> str:
    """Read the API key from the environment; raise `UserError` if it is not set."""
    return api_key_from_env(config.api_key_env, f"the teacher {config.model}", "teacher.api_key_env")
