"""The vLLM process of one engine: start, calls with a timeout, shutdown.

The front end (preprocessing, detokenization) runs in this process, the model in a child process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vz_ray.rollout.engine_stats import EngineStatLogger
from vz_ray.utils.timeouts import with_timeout

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

_LIVENESS_INTERVAL_S = 1.0
"""Interval between checks whether the child process is alive during a call."""
_SHUTDOWN_TIMEOUT_S = 30.0

T = TypeVar("T")


class EngineFailedError(RuntimeError):
    """The engine is unusable. Replace it and retry its requests elsewhere."""


class VllmProcess:
    """Handle of a running `AsyncLLM`.

    Attributes:
        name: Name of the engine, for errors.
        timeout_s: Timeout of each call.
        stat_logger: Receives vLLM's statistics.
    """

    def __init__(self, llm: AsyncLLM, *, name: str, timeout_s: float, stat_logger: EngineStatLogger) -> None:
        self._llm: AsyncLLM | None = llm
        self.name = name
        self.timeout_s = timeout_s
        self.stat_logger = stat_logger

    @classmethod
    async def start(
        cls, args: AsyncEngineArgs, *, name: str, log_file: Path, start_timeout_s: float, call_timeout_s: float
    ) -> VllmProcess:
        """Start the child process and load the model.

        Raises:
            StepTimeout: It did not start within `start_timeout_s`.
        """
        from vllm.v1.engine.async_llm import AsyncLLM

        stat_logger = EngineStatLogger()
        llm = await with_timeout(
            asyncio.to_thread(AsyncLLM.from_engine_args, args, stat_loggers=[stat_logger]),
            start_timeout_s,
            target=name,
            operation=f"starting an engine on {args.model} (log: {log_file})",
        )
        return cls(llm, name=name, timeout_s=call_timeout_s, stat_logger=stat_logger)

    @property
    def llm(self) -> AsyncLLM:
        """vLLM's engine. Await its methods through `call`."""
        if self._llm is None:
            raise EngineFailedError(f"{self.name} was shut down")
        return self._llm

    async def call(self, operation: str, call: Awaitable[T]) -> T:
        """Await a call to vLLM with the timeout, and translate its errors.

        Raises:
            ValueError: vLLM rejected the arguments.
            StepTimeout: The call exceeded `timeout_s`.
            EngineFailedError: The child process has died, or the call failed in it.
        """
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            return await with_timeout(
                self._while_alive(call, operation),
                self.timeout_s,
                target=self.name,
                operation=operation,
            )
        except VLLMClientError as error:
            raise ValueError(f"{self.name} cannot do {operation}: {error}") from error
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineFailedError(f"{self.name} failed at {operation}: {error.__cause__ or error}") from error

    async def _while_alive(self, call: Awaitable[T], operation: str) -> T:
        """Await a call while the child process is alive.

        When the process dies, vLLM fails running turns but never completes other calls.
        """
        future = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait({future}, timeout=_LIVENESS_INTERVAL_S))[0]:
                if self._llm is not None and self._llm.errored:
                    raise EngineFailedError(f"{self.name} failed at {operation}: its process has died")
            return future.result()
        finally:
            future.cancel()

    async def shutdown(self) -> None:
        """Terminate the child process. Idempotent."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        await with_timeout(
            asyncio.to_thread(llm.shutdown, _SHUTDOWN_TIMEOUT_S / 2),
            _SHUTDOWN_TIMEOUT_S,
            target=self.name,
            operation="shutting down its engine",
        )
        # vLLM's finalizer shuts down again. At interpreter exit it fails, because its module is unloaded.
        llm.shutdown = lambda timeout=None: None
