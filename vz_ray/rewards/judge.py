"""Client of a judge model behind an OpenAI-compatible endpoint.

    judge_answer(form, question, truth, answer), or one call per question of a caption (judge_caption)
        disk cache hit                      -> cached reply
        identical request in flight         -> its reply
        else a request, limited by `max_concurrency`
             429, 5xx, timeout, connection  -> retry with exponential backoff
             malformed reply, other errors  -> EndpointError
    EndpointError after `total_timeout_s` in any case

Calls block. All requests of a process run on one event loop in a background thread, so that the timeout also
ends a reply that arrives byte by byte. Imports and connections happen on the first request.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

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
from vz_ray.utils.openai_endpoint import ChatEndpoint, EndpointError, api_key_from_env
from vz_ray.utils.timeouts import StepTimeout, with_timeout

log = logging.getLogger(__name__)
T = TypeVar("T")

_GRACE_S = 5.0
"""Added to the timeout of the calling thread. If it expires, the event loop hangs."""


class Judge:
    """Client of the judge; safe to share between threads.

    Raises:
        UserError: A prompt file is invalid, or the API key is missing.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config
        self._prompts = {form: JudgePrompt.load(path, form) for form, path in prompt_files(config).items()}
        self._endpoint = ChatEndpoint(config.base_url, judge_api_key(config), config.request_timeout_s)
        self._parameters = {name: value for name, value in config.parameters.items() if value is not None}
        self._in_flight: dict[str, asyncio.Task[str]] = {}
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._cache_dir = _resolve_cache_dir(config.cache_dir)

    def judge_answer(self, form: JudgeForm, question: str, truth: str, answer: str) -> JudgeVerdict:
        """Compare `answer` with `truth`. Blocks for at most `total_timeout_s`.

        Raises:
            EndpointError: The request failed or the reply is malformed.
        """
        messages = self._prompts[form].messages(question, truth, answer)
        key = self._cache_key(form, messages)
        reply = self._load_cached(form, key) or self._run(self._request_shared(form, key, messages))
        return _parse_valid(form, reply)

    def judge_caption(self, caption: str, questions: Sequence[CaptionQuestion]) -> list[JudgeVerdict]:
        """Answer each question from the caption alone and compare the answers with the truth.

        The judge grades the answers in a second request, except for questions with options. Blocks for at
        most twice `total_timeout_s`.

        Raises:
            EndpointError: A request failed or a reply is malformed.
        """
        return self._run(self._judge_questions(caption, questions), 2 * self._config.total_timeout_s)

    def close(self) -> None:
        """Close the connections. The next call opens them again."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._shut_down(), loop).result(_GRACE_S)
            loop.call_soon_threadsafe(loop.stop)

    # -- cache and coalescing -------------------------------------------------------

    def _cache_key(self, form: JudgeForm, messages: list[dict[str, str]]) -> str:
        """Hash everything that determines the verdict."""
        content = [form.value, self._config.base_url, self._config.model, self._parameters, messages]
        return blake3(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def _path(self, key: str) -> Path:
        return self._cache_dir / key[:2] / f"{key}.json"

    def _load_cached(self, form: JudgeForm, key: str) -> str | None:
        """Return the cached reply; None on a miss or if the entry is damaged."""
        if not self._config.use_cache:
            return None
        try:
            reply = json.loads(self._path(key).read_bytes())["reply"]
            return str(reply) if is_valid_reply(form, reply) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _store(self, key: str, reply: str, messages: list[dict[str, str]]) -> None:
        if not self._config.use_cache:
            return
        path = self._path(key)
        entry = {"model": self._config.model, "reply": reply, "request": messages[-1]["content"]}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(entry, ensure_ascii=False).encode())
        except OSError as error:
            log.warning("Cannot write judge cache entry to %s: %s", path.parent, error)

    async def _request_shared(self, form: JudgeForm, key: str, messages: list[dict[str, str]]) -> str:
        """Coalesce identical requests. Cancelling one caller does not cancel the shared request."""
        if key not in self._in_flight:
            task = asyncio.ensure_future(self._request_valid(form, key, messages))
            task.add_done_callback(lambda _: self._in_flight.pop(key))
            self._in_flight[key] = task
        return await asyncio.shield(self._in_flight[key])

    # -- captions -------------------------------------------------------------------

    async def _judge_questions(self, caption: str, questions: Sequence[CaptionQuestion]) -> list[JudgeVerdict]:
        return list(await asyncio.gather(*(self._judge_question(caption, item) for item in questions)))

    async def _judge_question(self, caption: str, item: CaptionQuestion) -> JudgeVerdict:
        answer = strip_reasoning(await self._get_reply(JudgeForm.READING, item.question, "", caption))
        if item.answer_type is AnswerType.MULTIPLE_CHOICE:
            return JudgeVerdict(parse_choice(answer, parse_options(item.question)) == item.answer)
        reply = await self._get_reply(JudgeForm.GRADED, item.question, item.answer, answer)
        return _parse_valid(JudgeForm.GRADED, reply)

    async def _get_reply(self, form: JudgeForm, question: str, truth: str, answer: str) -> str:
        messages = self._prompts[form].messages(question, truth, answer)
        key = self._cache_key(form, messages)
        cached = await asyncio.to_thread(self._load_cached, form, key)
        return cached if cached is not None else await self._request_shared(form, key, messages)

    # -- requests -------------------------------------------------------------------

    async def _request_valid(self, form: JudgeForm, key: str, messages: list[dict[str, str]]) -> str:
        target, timeout_s = f"judge {self._config.model}", self._config.total_timeout_s
        try:
            reply = await with_timeout(
                self._request_with_retries(messages), timeout_s, target=target, operation="a verdict"
            )
        except StepTimeout as error:
            raise EndpointError("timeout", str(error)) from error
        if not is_valid_reply(form, reply):
            raise EndpointError("malformed", f"{self._config.model} replied {reply[:120]!r}")
        self._store(key, reply, messages)
        return reply

    async def _request_with_retries(self, messages: list[dict[str, str]]) -> str:
        """Return the first reply. Raise the last error if no attempt or time remains."""
        config, loop = self._config, asyncio.get_running_loop()
        body = {**self._parameters, "model": config.model, "messages": messages}
        deadline = loop.time() + config.total_timeout_s
        for attempt in range(1, config.max_attempts + 1):
            try:
                async with self._request_slots:
                    return (await self._endpoint.complete(body, config.request_timeout_s)).text
            except EndpointError as error:
                if not error.is_transient:
                    raise
                wait_s = error.retry_delay_s(attempt, config.backoff_s)
                log.info("Judge request failed: %s, attempt %d: %s", config.model, attempt, error)
                if attempt == config.max_attempts or loop.time() + wait_s >= deadline:
                    raise
            await asyncio.sleep(wait_s)
        raise AssertionError("every attempt returns or raises")

    # -- background event loop --------------------------------------------------------

    def _run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._ensure_loop())
        try:
            return future.result((timeout_s or self._config.total_timeout_s) + _GRACE_S)
        except CancelledError as error:
            raise EndpointError("closed", "the judge client was closed during the request") from error
        except TimeoutError as error:
            future.cancel()
            raise EndpointError("timeout", "the event loop of the judge client hangs") from error

    def _ensure_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._request_slots = asyncio.Semaphore(self._config.max_concurrency)
                threading.Thread(target=self._loop.run_forever, name="judge", daemon=True).start()
            return self._loop

    async def _shut_down(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)  # each caller gets an EndpointError
        await self._endpoint.close()


def _parse_valid(form: JudgeForm, reply: str) -> JudgeVerdict:
    verdict = parse_verdict(form, reply)
    assert verdict is not None
    return verdict


def prompt_files(config: JudgeConfig) -> dict[JudgeForm, str]:
    """Return the prompt file of each form."""
    return {
        JudgeForm.BINARY: config.prompt,
        JudgeForm.GRADED: config.graded_prompt,
        JudgeForm.READING: config.caption_prompt,
    }


def judge_api_key(config: JudgeConfig) -> str:
    """Read the API key from the environment; raise `UserError` if it is not set."""
    return api_key_from_env(
        config.api_key_env,
        f"the judge {config.model}",
        "reward.judge.api_key_env",
        "the environment of the rollout workers",
    )


def _resolve_cache_dir(directory: str) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(directory or os.path.join(home, "vz_ray", "verdicts"))


_JUDGES: dict[str, Judge] = {}
_JUDGES_LOCK = threading.Lock()


def get_judge(config: JudgeConfig) -> Judge:
    """Return the process-wide judge for `config`; create it on the first call."""
    key = json.dumps(asdict(config), sort_keys=True, default=str)
    with _JUDGES_LOCK:
        if key not in _JUDGES:
            _JUDGES[key] = Judge(config)
        return _JUDGES[key]
