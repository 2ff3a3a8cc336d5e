"""A model behind an OpenAI-compatible chat endpoint that plays episodes: hosted, served by vLLM, or our own.

    act(prompt)
        replied on disk already              -> that
        else a request: when the pace allows, when one of `concurrency` places is free,
        and if the most that it can cost is within the limit (else LimitReached)
             429, 5xx, timeout, connection,
             a reply that is no completion   -> again, later each time
             401, 403, 404                   -> UserError: the next one would fare no better
             any other status                -> ExpertFailed
    and ExpertFailed after `turn_s` of requests and waits between them

What the expert says is taken as it is: cut after its first `</video_zoom>`, which
servers leave out, pass on, or do not stop at, and otherwise judged by the episode.
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

_AGAIN = (408, 409, 425, 429)
"""Statuses below 500 after which the same request may succeed."""
_HOPELESS = {
    401: "check the key in expert.api_key_env",
    403: "check the key in expert.api_key_env",
    404: "check expert.model and expert.base_url",
}
"""Statuses that every further request would get too, and the fix."""
_LONGEST_WAIT_S = 60.0
"""Between two attempts."""
_CONTROL = (*VISION_PLACEHOLDERS, "<|im_start|>", "<|im_end|>", "<|endoftext|>")
"""What no text may hold: the tokenizer would make tokens of it that mean something else."""


class TeacherError(Exception):
    """A turn could not be had.

    Attributes:
        reason: To be counted by: `timeout`, `connection`, `status 500`, `nonsense`, `control token`.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class CostLimitReached(Exception):
    """The next request could bring the cost above the limit; it was not sent."""


class _RetryableTeacherError(TeacherError):
    """Another attempt may do better, not before `after_s` seconds."""

    def __init__(self, reason: str, detail: str, after_s: float = 0.0) -> None:
        super().__init__(reason, detail)
        self.after_s = after_s


class TeacherClient:
    """The endpoint; all episodes of a process share one.

    Args:
        config: Whom to ask, and the limits.
        ledger: Where replies are kept and costs counted.
        check: Called before each request; what it raises keeps it from being sent.

    Raises:
        UserError: The environment lacks the key.
    """

    def __init__(
        self, config: TeacherConfig, account: CostLedger, check: Callable[[], None] = lambda: None
    ) -> None:
        self.config, self.ledger = config, account
        self._check = check
        self._key = teacher_api_key(config)
        self._pace = RateLimiter(config.requests_per_minute, config.tokens_per_minute)
        self._places = asyncio.Semaphore(config.max_concurrency)
        self._closed = asyncio.Condition()
        self._client: AsyncOpenAI | None = None
        self._ratio = 1.0  # of tokens counted by the server to those estimated, the largest seen

    async def complete(
        self,
        messages: Sequence[PromptMessage],
        sampling: SamplingParams,
        *,
        request: str,
        image_cache: dict[str, str],
    ) -> TeacherReply:
        """The completion of `messages`; `image_cache` keeps images by digest from turn to turn.

        Raises:
            ExpertFailed: It could not be had.
            LimitReached: It could cost more than is left.
            UserError: The endpoint refuses all requests of this kind.
        """
        key = self._identity(messages, sampling, request)
        if (known := self.ledger.get_reply(key)) is not None:
            return known
        body = await asyncio.to_thread(self._body, messages, sampling, image_cache)
        return await self._attempts(
            key, body, (estimate_prompt_tokens(messages, self.config.tokens_per_image), sampling.max_tokens)
        )

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    # -- what is asked --------------------------------------------------------------

    def _identity(self, messages: Sequence[PromptMessage], sampling: SamplingParams, request: str) -> str:
        """Names a reply by all that decides it, and by which of several equal requests it answers."""
        said = [[m.role, m.text, [frame.ref.digest for frame in m.frames]] for m in messages]
        drawn = [sampling.temperature, sampling.top_p, sampling.max_tokens, self.config.parameters]
        everything = [request, self.config.model, drawn, said]
        return blake3(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def _body(
        self, messages: Sequence[PromptMessage], sampling: SamplingParams, encoded: dict[str, str]
    ) -> dict[str, Any]:
        body = {
            "model": self.config.model,
            "messages": [
                {"role": m.role, "content": encode_content(m, self.config.image_format, encoded)}
                for m in messages
            ],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self.config.max_tokens_param: sampling.max_tokens,
            **self.config.parameters,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _usd(self, prompt: int, completion: int) -> float:
        return (prompt * self.config.input_usd_per_mtok + completion * self.config.output_usd_per_mtok) / 1e6

    # -- asking ---------------------------------------------------------------------

    async def _attempts(self, key: str, body: dict[str, Any], tokens: tuple[int, int]) -> TeacherReply:
        """The first completion; the last failure where there is no time for another attempt.

        Waiting for its turn takes none of the turn's time: only the episode's.
        """
        config, loop = self.config, asyncio.get_running_loop()
        left_s = config.turn_timeout_s
        for attempt in range(1, config.max_attempts + 1):
            async with self._places:
                prompt = math.ceil(self._ratio * tokens[0])
                sent = await self._paced(prompt + tokens[1])
                await self._admit(key, self._usd(prompt, tokens[1]))
                began = loop.time()
                try:
                    reply = await self._request(
                        key, body, (prompt, tokens[1]), min(config.request_timeout_s, left_s)
                    )
                except _RetryableTeacherError as error:
                    failed = error
                else:
                    sent.tokens = reply.prompt_tokens + reply.completion_tokens
                    self._ratio = max(self._ratio, reply.prompt_tokens / tokens[0])
                    return reply
            log.info("expert %s, attempt %d: %s", config.model, attempt, failed)
            backoff = config.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
            wait = max(min(backoff, _LONGEST_WAIT_S), failed.after_s)
            left_s -= loop.time() - began + wait
            if attempt == config.max_attempts or left_s <= 0:
                raise failed
            await self._sleep(wait)
        raise AssertionError("every attempt returns or raises")

    async def _paced(self, tokens: int) -> SentRequest:
        """Waits until a request of `tokens` may go out."""
        loop = asyncio.get_running_loop()
        while (wait := self._pace.wait_time_s(loop.time(), tokens)) > 0:
            await self._sleep(wait)
        return self._pace.record_request(loop.time(), tokens)

    async def _sleep(self, seconds: float) -> None:
        """Waits; a stop that is asked for meanwhile is raised within a second."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while (left := end - loop.time()) > 0:
            self._check()
            await asyncio.sleep(min(left, 1.0))

    async def _request(
        self, key: str, body: dict[str, Any], tokens: tuple[int, int], timeout_s: float
    ) -> TeacherReply:
        """One request that is on the account, and closed there whatever comes of it."""
        closed = False
        try:
            reply = self._read(await self._answered(body, timeout_s), tokens)
            self.ledger.record_reply(key, reply)
            closed = True
            return reply
        except _RequestRejected as refused:
            self.ledger.record_rejection(key)
            closed = True
            raise refused.error from refused
        finally:
            if not closed:
                self.ledger.record_lost()
            async with self._closed:
                self._closed.notify_all()

    async def _admit(self, key: str, usd: float) -> None:
        """Puts a request on the account; where others may cost less than feared, waits for them first."""
        async with self._closed:
            while True:
                self._check()
                if self.ledger.can_afford(usd):
                    self.ledger.reserve(key, usd)
                    return
                if not self.ledger.has_pending_requests:
                    raise CostLimitReached(f"the next request may cost ${usd:.4f}")
                await self._closed.wait()

    async def _answered(self, body: dict[str, Any], timeout_s: float) -> Any:
        """What the server said. Raises `_Refused` for a status, `_Again` where nothing came."""
        import openai

        config = self.config
        try:
            return await with_timeout(
                self._create(body), timeout_s, target=config.base_url, operation="an expert's reply"
            )
        except (StepTimeout, openai.APITimeoutError) as error:
            raise _RetryableTeacherError("timeout", str(error)) from error
        except openai.APIConnectionError as error:
            raise _RetryableTeacherError(
                "connection", f"{config.base_url}: {error.__cause__ or error}"
            ) from error
        except openai.APIStatusError as error:
            raise _RequestRejected(self._refusal(error)) from error
        except (openai.APIError, ValueError) as error:
            raise _RetryableTeacherError("nonsense", f"{config.base_url}: {error}") from error

    def _refusal(self, error: Any) -> Exception:
        status, config = int(error.status_code), self.config
        kind, detail = f"status {status}", f"{config.base_url}: {error.message[:200]}"
        if status in _HOPELESS:
            return UserError(
                f"the expert {config.model} refuses with status {status} ({detail}); {_HOPELESS[status]}"
            )
        if status in _AGAIN or status >= 500:
            return _RetryableTeacherError(kind, detail, retry_after_s(error.response.headers))
        return TeacherError(kind, detail)

    def _create(self, body: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        from openai import AsyncOpenAI

        if self._client is None:
            self._client = AsyncOpenAI(
                api_key=self._key,
                base_url=self.config.base_url,
                timeout=self.config.request_timeout_s,
                max_retries=0,  # ours are counted, and paid for, one by one
            )
        create: Any = self._client.chat.completions.create
        known = {name: body[name] for name in ("model", "messages")}
        more = {name: value for name, value in body.items() if name not in known}
        said: Coroutine[Any, Any, Any] = create(**known, extra_body=more)
        return said

    def _read(self, response: Any, tokens: tuple[int, int]) -> TeacherReply:
        """A completion as a reply; `_Again` if it is none. No text (a filter, a refusal) is an empty one."""
        try:
            choice = response.choices[0]
            message = choice.message
            text, stop = message.content or "", str(choice.finish_reason or "")
        except (AttributeError, IndexError, TypeError) as error:
            raise _RetryableTeacherError(
                "nonsense", f"{self.config.model} replied {str(response)[:120]!r}"
            ) from error
        if not isinstance(text, str):
            raise _RetryableTeacherError(
                "nonsense", f"{self.config.model} replied no text: {str(text)[:120]!r}"
            )
        usage = getattr(response, "usage", None)
        counted = (getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None))
        reported = all(isinstance(count, int) and count >= 0 for count in counted)
        prompt, completion = counted if reported else tokens
        assert isinstance(prompt, int)
        assert isinstance(completion, int)
        return TeacherReply(text, stop, prompt, completion, self._usd(prompt, completion), reported)


class _RequestRejected(Exception):
    """The server said no, and charges nothing; `error` is what to make of it."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class TeacherPolicy:
    """The expert as the `PolicyModel` of one episode."""

    def __init__(
        self, expert: TeacherClient, wire: ChatFormat, guide: TeacherPrompt, *, prefix_turns: int = 0
    ) -> None:
        """`prefix_turns` is how many turns were taken by others."""
        self._expert, self._wire, self._guide, self._after = expert, wire, guide, prefix_turns
        self._encoded: dict[str, str] = {}

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str
    ) -> ExternalAction:
        messages = add_teacher_prompt(prompt.messages, self._guide, self._after)
        reply = await self._expert.complete(
            messages, sampling_params, request=request_id, image_cache=self._encoded
        )
        text = truncate_to_one_turn(reply.text, reply.finish_reason)
        if found := next((token for token in _CONTROL if token in text), None):
            raise TeacherError("control token", f"the reply to {request_id} holds {found}")
        return ExternalAction(text, self._wire.encode_assistant(text))


def teacher_api_key(config: TeacherConfig) -> str:
    """The key that `api_key_env` names; `UserError` if it is not set."""
    return api_key_from_env(config.api_key_env, f"the expert {config.model}", "expert.api_key_env")
