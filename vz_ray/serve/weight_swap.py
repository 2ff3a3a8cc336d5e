"""Exchange the weights of a serving replica without dropping a request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from vz_ray.config.serve import ServeConfig
from vz_ray.rollout.vllm_engine import VllmEngine
from vz_ray.rollout.vllm_process import EngineFailedError
from vz_ray.utils.errors import UserError
from vz_ray.utils.temp_dir import temp_dir
from vz_ray.utils.timeouts import StepTimeout, with_timeout
from vz_ray.weight_sync import CheckpointSource, ShmTransport, WeightStore

log = logging.getLogger(__name__)


class WeightSwap:
    """Weights of one replica, and admission of requests while they change.

    Attributes:
        swap_error: Why the last new weights were refused; empty if they were loaded.
        engine_error: Why the engine must be replaced after a partial swap; empty if it is usable.
        active_requests: Number of running requests.
    """

    def __init__(self, config: ServeConfig, name: str) -> None:
        self._drain_timeout_s, self._name = config.timeouts.drain_s, name
        self._accepting, self._idle = asyncio.Event(), asyncio.Event()
        self._accepting.set()
        self._idle.set()
        self.active_requests = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.swap_error = self.engine_error = ""

    def set_initial(self, model: str, version: int) -> None:
        """Record the weights that the engine started with."""
        self._shapes = _shapes(CheckpointSource(model))
        log.info("Serving version %d on %s: %s", version, self._name, model)

    @asynccontextmanager
    async def request_slot(self) -> AsyncIterator[None]:
        """Count one running request; wait before it while weights are being exchanged."""
        while not self._accepting.is_set():
            await self._accepting.wait()
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
        """Replace the engine's weights with those of the checkpoint `model`.

        Weights of another shape are refused before the engine changes: the engine keeps its weights and
        `swap_error` is set. An exception here would make Ray Serve take the replica out of service.
        """
        try:
            source = await asyncio.to_thread(CheckpointSource, model)
            await asyncio.to_thread(self._check_shapes, source)
        except UserError as error:
            self.swap_error = f"version {version} was refused: {error}"
            log.error("%s: %s", self._name, self.swap_error)
            return
        with temp_dir("vz_ray_weights_", Path("/dev/shm")) as folder:
            update = await ShmTransport(WeightStore(folder), source).prepare(version)
            self._accepting.clear()
            try:
                await self._drain(version)
                await engine.pause()
                await engine.receive_weights(update)
                await engine.resume()
            except Exception as error:
                self.engine_error = f"{self._name} failed while loading version {version}: {error}"
                raise
            finally:
                self._accepting.set()
        self.swap_error = ""
        log.info("Serving version %d on %s: %s", version, self._name, model)

    def _check_shapes(self, source: CheckpointSource) -> None:
        current, new = self._shapes, _shapes(source)
        if missing := sorted(current.keys() - new.keys()):
            raise UserError(f"tensor {missing[0]} is missing (and {len(missing) - 1} more)")
        if extra := sorted(new.keys() - current.keys()):
            raise UserError(f"tensor {extra[0]} (and {len(extra) - 1} more) is not in the served model")
        for name, shape in current.items():
            if new[name] != shape:
                raise UserError(f"tensor {name} has shape {list(new[name])}; the served model has {list(shape)}")

    async def _drain(self, version: int) -> None:
        try:
            await with_timeout(
                self._idle.wait(), self._drain_timeout_s, target=self._name, operation="draining requests"
            )
        except StepTimeout:
            log.warning(
                "Drain timeout of %g s on %s: %d running requests continue with version %d",
                self._drain_timeout_s,
                self._name,
                self.active_requests,
                version,
            )


def _shapes(source: CheckpointSource) -> dict[str, tuple[int, ...]]:
    return {_canonical_name(spec.name): spec.shape for spec in source.specs()}


def _canonical_name(name: str) -> str:
    """Return a tensor name without the prefixes that only some transformers versions add.

    Example: `layers.0.mlp.up_proj.weight` of `model.language_model.layers.0...` and of `model.layers.0...`
    """
    return name.removeprefix("model.").removeprefix("language_model.")
