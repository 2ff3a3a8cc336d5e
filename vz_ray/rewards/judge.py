"""A judge model behind an OpenAI-compatible endpoint, asked only where an answer needs it.

    verdict(form, question, truth, answer), or several of a caption (examine)
        on disk already                     -> that one
        being asked by another episode      -> the same one
        else a request, when one of `concurrency` places is free
             429, 5xx, timeout, connection  -> again, later each time
             nonsense, anything else        -> JudgeFailed
    and JudgeFailed after `deadline_s`, whatever happens

Callers block; all requests of a process run on one event loop in a thread of
its own, so that a deadline ends also a reply that trickles. Nothing is
imported, opened or connected before the first answer that needs it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from blake3 import blake3

from vz_ray.config.reward import JudgeConfig
from vz_ray.env.task import AnswerType, CaptionQuestion
from vz_ray.rewards.judge_protocol import (
    JudgeForm,
    JudgePrompt,
    JudgeVerdict,
    is_valid_reply,
    parse_verdict,
    strip_reasoning,
)
from vz_ray.rewards.multiple_choice import parse_choice, parse_options
from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.openai_endpoint import api_key_from_env, retry_after_s
from vz_ray.utils.timeouts import StepTimeout, with_timeout

if TYPE_CHECKING:
    from openai import AsyncOpenAI

log = logging.getLogger(__name__)
T = TypeVar("T")

_AGAIN = (408, 409, 429)
"""Statuses below 500 after which the same request may succeed."""
_LONGEST_WAIT_S = 60.0
"""Between two attempts."""
_GRACE_S = 5.0
"""How much longer than its deadline a verdict is waited for: by then the loop itself hangs."""


class JudgeError(Exception):
    """There is no verdict.

    Attributes:
        reason: One of a few, to be counted: `timeout`, `connection`, `status 500`, `nonsense`.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason

    def __reduce__(self) -> tuple[type[JudgeError], tuple[str, str]]:
        return (JudgeError, (self.reason, str(self).removeprefix(f"{self.reason}: ")))


class _RetryableJudgeError(JudgeError):
    """Another attempt may do better, not before `after_s` seconds."""

    def __init__(self, reason: str, detail: str, after_s: float = 0.0) -> None:
        super().__init__(reason, detail)
        self.after_s = after_s


class Judge:
    """Asks for verdicts; threads may share it.

    Raises:
        UserError: A prompt file is wrong, or the environment lacks the key.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config
        self._wordings = {form: JudgePrompt.load(path, form) for form, path in prompt_files(config).items()}
        self._key = judge_api_key(config)
        self._parameters = {name: value for name, value in config.parameters.items() if value is not None}
        self._asked: dict[str, asyncio.Task[str]] = {}
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: AsyncOpenAI | None = None
        self._disk = _directory(config.cache_dir)

    def judge_answer(self, form: JudgeForm, question: str, truth: str, answer: str) -> JudgeVerdict:
        """Whether `answer` says what `truth` does; blocks for at most `deadline_s`.

        Raises:
            JudgeFailed: It could not be had, or was nonsense.
        """
        messages = self._wordings[form].messages(question, truth, answer)
        key = self._identity(form, messages)
        reply = self._recalled(form, key) or self._run(self._shared(form, key, messages))
        return _verdict(form, reply)

    def judge_caption(self, caption: str, checks: Sequence[CaptionQuestion]) -> list[JudgeVerdict]:
        """What a caption says about each question, and whether that is the truth.

        Blocks for at most twice `deadline_s`: the judge answers a question from the caption alone, and
        then grades that answer; of a question with options, the answer names one.

        Raises:
            JudgeFailed: As `judge_answer`, for one of the questions.
        """
        return self._run(self._examined(caption, checks), 2 * self._config.total_timeout_s)

    def close(self) -> None:
        """Closes its connections; it may be used again."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._end(), loop).result(_GRACE_S)
            loop.call_soon_threadsafe(loop.stop)

    # -- once for all who want it ---------------------------------------------------

    def _identity(self, form: JudgeForm, messages: list[dict[str, str]]) -> str:
        """Names a verdict by all that decides it."""
        said = [form.value, self._config.base_url, self._config.model, self._parameters, messages]
        return blake3(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()

    def _path(self, key: str) -> Path:
        return self._disk / key[:2] / f"{key}.json"

    def _recalled(self, form: JudgeForm, key: str) -> str | None:
        """The reply on disk; None if there is none, or a damaged one."""
        if not self._config.use_cache:
            return None
        try:
            reply = json.loads(self._path(key).read_bytes())["reply"]
            return str(reply) if is_valid_reply(form, reply) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _keep(self, key: str, reply: str, messages: list[dict[str, str]]) -> None:
        if not self._config.use_cache:
            return
        path = self._path(key)
        said = {"model": self._config.model, "reply": reply, "asked": messages[-1]["content"]}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(said, ensure_ascii=False).encode())
        except OSError as error:
            log.warning("a verdict could not be kept in %s: %s", path.parent, error)

    async def _shared(self, form: JudgeForm, key: str, messages: list[dict[str, str]]) -> str:
        """The reply that is being asked for already, or a new request's."""
        if key not in self._asked:
            task = asyncio.ensure_future(self._ask(form, key, messages))
            task.add_done_callback(lambda _: self._asked.pop(key))
            self._asked[key] = task
        return await asyncio.shield(self._asked[key])

    # -- captions -------------------------------------------------------------------

    async def _examined(self, caption: str, checks: Sequence[CaptionQuestion]) -> list[JudgeVerdict]:
        return list(await asyncio.gather(*(self._check(caption, check) for check in checks)))

    async def _check(self, caption: str, check: CaptionQuestion) -> JudgeVerdict:
        said = strip_reasoning(await self._reply(JudgeForm.READING, check.question, "", caption))
        if check.answer_type is AnswerType.MULTIPLE_CHOICE:
            return JudgeVerdict(parse_choice(said, parse_options(check.question)) == check.answer)
        return _verdict(
            JudgeForm.GRADED, await self._reply(JudgeForm.GRADED, check.question, check.answer, said)
        )

    async def _reply(self, form: JudgeForm, question: str, truth: str, answer: str) -> str:
        messages = self._wordings[form].messages(question, truth, answer)
        key = self._identity(form, messages)
        kept = await asyncio.to_thread(self._recalled, form, key)
        return kept if kept is not None else await self._shared(form, key, messages)

    # -- asking ---------------------------------------------------------------------

    async def _ask(self, form: JudgeForm, key: str, messages: list[dict[str, str]]) -> str:
        who, deadline = f"judge {self._config.model}", self._config.total_timeout_s
        try:
            reply = await with_timeout(self._attempts(messages), deadline, target=who, operation="a verdict")
        except StepTimeout as error:
            raise JudgeError("timeout", str(error)) from error
        if not is_valid_reply(form, reply):
            raise JudgeError("nonsense", f"{self._config.model} replied {reply[:120]!r}")
        self._keep(key, reply, messages)
        return reply

    async def _attempts(self, messages: list[dict[str, str]]) -> str:
        """The first reply; the last failure where there is no time for another attempt."""
        config, loop = self._config, asyncio.get_running_loop()
        end = loop.time() + config.total_timeout_s
        for attempt in range(1, config.max_attempts + 1):
            try:
                async with self._free:
                    return await self._request(messages)
            except _RetryableJudgeError as error:
                backoff = config.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
                wait = min(max(backoff, error.after_s), _LONGEST_WAIT_S)
                log.info("judge %s, attempt %d: %s", config.model, attempt, error)
                if attempt == config.max_attempts or loop.time() + wait >= end:
                    raise
            await asyncio.sleep(wait)
        raise AssertionError("every attempt returns or raises")

    async def _request(self, messages: list[dict[str, str]]) -> str:
        """One request's reply."""
        import openai

        config = self._config
        try:
            reply = await with_timeout(
                self._create(messages),
                config.request_timeout_s,
                target=config.base_url,
                operation="a judge's reply",
            )
        except (StepTimeout, openai.APITimeoutError) as error:
            raise _RetryableJudgeError("timeout", str(error)) from error
        except openai.APIConnectionError as error:
            raise _RetryableJudgeError(
                "connection", f"{config.base_url}: {error.__cause__ or error}"
            ) from error
        except openai.APIStatusError as error:
            status = error.status_code
            kind, detail = f"status {status}", f"{config.base_url}: {error.message[:200]}"
            if status in _AGAIN or status >= 500:
                raise _RetryableJudgeError(kind, detail, retry_after_s(error.response.headers)) from error
            raise JudgeError(kind, detail) from error
        except (openai.APIError, ValueError) as error:
            raise JudgeError("nonsense", f"{config.base_url}: {error}") from error
        try:
            text = reply.choices[0].message.content
        except (AttributeError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            raise JudgeError("nonsense", f"{config.model} replied no text: {str(reply)[:120]!r}")
        return text

    def _create(self, messages: list[dict[str, str]]) -> Coroutine[Any, Any, Any]:
        from openai import AsyncOpenAI

        if self._client is None:
            self._client = AsyncOpenAI(
                api_key=self._key,
                base_url=self._config.base_url,
                timeout=self._config.request_timeout_s,
                max_retries=0,  # ours are counted, and wait within the verdict's deadline
            )
        create: Any = self._client.chat.completions.create
        said: Coroutine[Any, Any, Any] = create(
            model=self._config.model, messages=messages, extra_body=self._parameters
        )
        return said

    # -- the loop -------------------------------------------------------------------

    def _run(self, asking: Coroutine[Any, Any, T], deadline_s: float | None = None) -> T:
        waiting = asyncio.run_coroutine_threadsafe(asking, self._running())
        try:
            return waiting.result((deadline_s or self._config.total_timeout_s) + _GRACE_S)
        except CancelledError as error:
            raise JudgeError("closed", "the judge was closed while it was asked") from error
        except TimeoutError as error:
            waiting.cancel()
            raise JudgeError("timeout", "the loop that asks the judge hangs") from error

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._free = asyncio.Semaphore(self._config.max_concurrency)
                threading.Thread(target=self._loop.run_forever, name="judge", daemon=True).start()
            return self._loop

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)  # each must tell its asker
        if self._client is not None:
            await self._client.close()
            self._client = None


def _verdict(form: JudgeForm, reply: str) -> JudgeVerdict:
    """What a reply that is `readable` states."""
    found = parse_verdict(form, reply)
    assert found is not None
    return found


def prompt_files(config: JudgeConfig) -> dict[JudgeForm, str]:
    """The wording file of each form."""
    return {
        JudgeForm.BINARY: config.prompt,
        JudgeForm.GRADED: config.graded_prompt,
        JudgeForm.READING: config.caption_prompt,
    }


def judge_api_key(config: JudgeConfig) -> str:
    """The key that `api_key_env` names; `UserError` if it is not set."""
    return api_key_from_env(
        config.api_key_env,
        f"the judge {config.model}",
        "reward.judge.api_key_env",
        "the environment of the rollout workers",
    )


def _directory(directory: str) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(directory or os.path.join(home, "vz_ray", "verdicts"))


_JUDGES: dict[str, Judge] = {}
_MAKING = threading.Lock()


def get_judge(config: JudgeConfig) -> Judge:
    """This process's judge of that configuration, made when first asked for."""
    key = json.dumps(asdict(config), sort_keys=True, default=str)
    with _MAKING:
        if key not in _JUDGES:
            _JUDGES[key] = Judge(config)
        return _JUDGES[key]
