"""Weight-update interface of a rollout engine: one protocol, one remote proxy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from vz_ray.weight_sync.parity_probe import ParityProbe
from vz_ray.weight_sync.weight_version import ProbeScore, WeightUpdate


class EngineClient(Protocol):
    """An engine that takes part in a publish, local or remote.

    Every call returns after the engine has completed the operation.
    """

    @property
    def name(self) -> str: ...

    @property
    def pulls_weights(self) -> bool:
        """Whether the engine pulls a copy instead of joining a broadcast.

        True on nodes that can be reclaimed at any time.
        """
        ...

    @property
    def learner_rank(self) -> int:
        """Learner rank on the engine's GPU, if they share one."""
        ...

    async def init_weight_transfer(self, info: dict[str, Any]) -> None:
        """Connect to the learner's transport."""
        ...

    async def sleep(self, level: int) -> None:
        """End all turns and free the GPU memory, until `pause` and `resume_engine`.

        Args:
            level: 1 keeps a copy of the weights in host memory, 2 discards them.
        """
        ...

    async def pause(self) -> None:
        """Pause generation and clear the caches. A sleeping engine allocates the memory of its weights instead."""
        ...

    async def receive_weights(self, update: WeightUpdate) -> None:
        """Load one complete set of weights. Requires `pause`."""
        ...

    async def begin_update(self) -> None:
        """Begin to load one complete set of weights in parts. Requires `pause`."""
        ...

    async def receive_part(self, info: dict[str, Any]) -> None:
        """Load one part of the weights. `info` is the `update_info` of the vLLM transfer backend."""
        ...

    async def finish_update(self, version: int) -> None:
        """Activate the weights after the last part."""
        ...

    async def resume_engine(self) -> None:
        """Resume computation. New turns still wait, so that the weights can be checked first.

        A sleeping engine allocates its KV cache first.
        """
        ...

    async def continue_probe(self, probe: ParityProbe) -> Sequence[int]:
        """Return a greedy continuation of the probe's prompt, as long as the probe's own."""
        ...

    async def score_probe(self, probe: ParityProbe) -> ProbeScore:
        """Score the probe's tokens. Requires `resume_engine`."""
        ...

    async def resume(self) -> None:
        """Undo `pause`."""
        ...


class RemoteEngineClient(ABC):
    """`EngineClient` that forwards each operation to `call_engine`."""

    @abstractmethod
    async def call_engine(self, method: str, *args: Any) -> Any:
        """Call `method` of the remote engine."""

    async def init_weight_transfer(self, info: dict[str, Any]) -> None:
        await self.call_engine("init_weight_transfer", info)

    async def sleep(self, level: int) -> None:
        await self.call_engine("sleep", level)

    async def pause(self) -> None:
        await self.call_engine("pause")

    async def receive_weights(self, update: WeightUpdate) -> None:
        await self.call_engine("receive_weights", update)

    async def begin_update(self) -> None:
        await self.call_engine("begin_update")

    async def receive_part(self, info: dict[str, Any]) -> None:
        await self.call_engine("receive_part", info)

    async def finish_update(self, version: int) -> None:
        await self.call_engine("finish_update", version)

    async def resume_engine(self) -> None:
        await self.call_engine("resume_engine")

    async def continue_probe(self, probe: ParityProbe) -> Sequence[int]:
        return await self.call_engine("continue_probe", probe)

    async def score_probe(self, probe: ParityProbe) -> ProbeScore:
        return await self.call_engine("score_probe", probe)

    async def resume(self) -> None:
        await self.call_engine("resume")
