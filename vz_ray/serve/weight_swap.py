"""Which weights a replica holds, and how it comes to hold others without dropping a request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from vz_ray.config.serve import ServeConfig
from vz_ray.rollout.vllm_engine import EngineFailedError, VllmEngine
from vz_ray.utils.errors import UserError
from vz_ray.utils.temp_dir import temp_dir
from vz_ray.utils.timeouts import StepTimeout, with_timeout
from vz_ray.weight_sync import CheckpointSource, ShmTransport, WeightStore

log = logging.getLogger(__name__)


class WeightSwap:
    """A replica's weights, and the requests that it plays with them.

    Attributes:
        swap_error: Why the last weights that were offered were not taken; empty if they were.
        engine_error: Why the engine, left between two sets of weights, must be replaced; else empty.
        active_requests: Requests that are played now.
    """

    def __init__(self, config: ServeConfig, name: str) -> None:
        self._drain_s, self._name = config.timeouts.drain_s, name
        self._open, self._idle = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._idle.set()
        self.active_requests = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.swap_error = self.engine_error = ""

    def set_initial(self, model: str, version: int) -> None:
        """The replica has started with these."""
        self._shapes = _shapes(CheckpointSource(model))
        log.info("%s answers with version %d, %s", self._name, version, model)

    @asynccontextmanager
    async def request_slot(self) -> AsyncIterator[None]:
        """A request is played within; it waits while weights are exchanged."""
        while not self._open.is_set():
            await self._open.wait()
        if self.engine_error:
            raise EngineFailedError(self.engine_error)
        self.active_requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.active_requests -= 1
            if not self.active_requests:
                self._idle.set()

    async def swap(self, engine: VllmEngine, model: str, version: int) -> None:
        """Exchanges the engine's weights for those in `model`.

        Weights of another shape are refused before the engine is touched: it goes on with its own, and
        `swap_error` says why, since a replica that failed here would be taken out of service.
        """
        try:
            source = await asyncio.to_thread(CheckpointSource, model)
            await asyncio.to_thread(self._check, source)
        except UserError as error:
            self.swap_error = f"version {version} was not taken: {error}"
            log.error("%s: %s", self._name, self.swap_error)
            return
        with temp_dir("vz_ray_weights_", Path("/dev/shm")) as folder:
            update = await ShmTransport(WeightStore(folder), source).prepare(version)
            self._open.clear()
            try:
                await self._drained(version)
                await engine.pause()
                await engine.receive_weights(update)
                await engine.resume()
            except Exception as error:
                self.engine_error = f"{self._name} failed while it took version {version}: {error}"
                raise
            finally:
                self._open.set()
        self.swap_error = ""
        log.info("%s answers with version %d, %s", self._name, version, model)

    def _check(self, source: CheckpointSource) -> None:
        own, new = self._shapes, _shapes(source)
        if missing := sorted(own.keys() - new.keys()):
            raise UserError(f"it lacks {missing[0]} (and {len(missing) - 1} more)")
        if extra := sorted(new.keys() - own.keys()):
            raise UserError(f"it has {extra[0]} (and {len(extra) - 1} more), which the served model has not")
        for name, shape in own.items():
            if new[name] != shape:
                raise UserError(f"its {name} is {list(new[name])}, the served model's {list(shape)}")

    async def _drained(self, version: int) -> None:
        try:
            await with_timeout(
                self._idle.wait(), self._drain_s, target=self._name, operation="requests under way"
            )
        except StepTimeout:
            log.warning(
                "%s: %d requests were under way for %g s and end with version %d",
                self._name,
                self.active_requests,
                self._drain_s,
                version,
            )


def _shapes(source: CheckpointSource) -> dict[str, tuple[int, ...]]:
    return {_name(spec.name): spec.shape for spec in source.specs()}


def _name(name: str) -> str:
    """A tensor's name without what transformers has put before it in some versions and not in others.

    Example: `layers.0.mlp.up_proj.weight` of `model.language_model.layers.0...` and of `model.layers.0...`
    """
    return name.removeprefix("model.").removeprefix("language_model.")
