"""Learner side of a publish: prepare one version of the weights and make it available to engines."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from vz_ray.weight_sync.engine_client import EngineClient
from vz_ray.weight_sync.parity_probe import ParityProbe
from vz_ray.weight_sync.weight_source import WeightSource
from vz_ray.weight_sync.weight_store import WeightStore
from vz_ray.weight_sync.weight_version import ProbeScore, WeightUpdate


class WeightTransport(ABC):
    """Learner side of a publish.

    The defaults suit transports without a connection, from which engines pull. Every call applies
    its own timeout and reports the learner's state on expiry.
    """

    @abstractmethod
    async def prepare(self, version: int, probe: ParityProbe | None = None) -> WeightUpdate:
        """Prepare the current weights as `version` while the engines still generate, and score `probe` with them."""

    async def connect(self, engines: Sequence[EngineClient]) -> None:
        """Connect exactly these engines while they still generate."""
        return None

    async def send(self, update: WeightUpdate) -> None:
        """Push the weights while the engines receive.

        Raises:
            WeightIntegrityError: The learner no longer holds this version.
        """
        return None

    def parts(
        self, update: WeightUpdate, receivers: Callable[[], frozenset[int]]
    ) -> AsyncGenerator[Sequence[dict[str, Any]]]:
        """Yield the parts of an update with `in_parts`, in order.

        Args:
            update: The update.
            receivers: Returns the learner ranks whose engine still receives. Other ranks export nothing, because only
                a receiver can release an exported part.

        Yields:
            The `update_info` of vLLM's transfer backend for the engine of each learner rank. It is valid until the
            next part is requested.
        """
        raise NotImplementedError(f"{type(self).__name__} does not send weights in parts")

    async def release(self) -> None:
        """Free the memory that the engines need to compute; every engine has received the weights."""
        return None

    async def abort(self) -> None:
        """Make a running `send` fail because a receiver has died."""
        return None

    def start_copy(self, update: WeightUpdate) -> None:
        """Start to write a copy of a delivered version that engines can pull, without waiting for it."""
        return None

    async def copy(self, update: WeightUpdate) -> WeightUpdate | None:
        """Return a copy of this version that engines can pull, or None."""
        return update if update.is_pull else None


class ShmTransport(WeightTransport):
    """Write versions of a weight source to shared memory.

    Args:
        store: Store that the engines can read.
        source: Weights to publish.
        score_probe: Score the probe with the current weights. None disables the parity check.
    """

    def __init__(
        self,
        store: WeightStore,
        source: WeightSource,
        score_probe: Callable[[ParityProbe], ProbeScore] | None = None,
    ) -> None:
        self._store, self._source, self._score_probe = store, source, score_probe

    async def prepare(self, version: int, probe: ParityProbe | None = None) -> WeightUpdate:
        manifest = await asyncio.to_thread(self._store.write_version, version, self._source)
        score = await asyncio.to_thread(self._score_probe, probe) if self._score_probe and probe else None
        checksum = manifest.checksum
        info = {"directory": str(self._store.path(version)), "checksum": checksum}
        return WeightUpdate(version, checksum, info, manifest.nbytes, score)
