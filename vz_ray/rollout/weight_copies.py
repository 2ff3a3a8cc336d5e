"""Copies of published weight versions on other nodes: once per node, one bucket at a time.

    source node: read bucket i --> Ray object --> every other node: write bucket i --> ... --> commit

At most a few buckets are in Ray's object store at once, whatever the size of the weights. Nodes that copy at the
same time share the objects.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vz_ray.weight_sync import WeightManifest
from vz_ray.weight_sync.weight_store import MANIFEST_NAME

_SHARED_BUCKETS = 4
"""Objects that are kept for nodes that read them later; others are read again."""

CallWorker = Callable[..., Awaitable[Any]]
"""`(method, *args)`: call a method of a worker on the node."""


# Defined at module level: Ray keeps a record of every remote function ever created.
@ray.remote(num_cpus=0)
def _read_manifest(directory: str) -> str:
    return (Path(directory) / MANIFEST_NAME).read_text()


@ray.remote(num_cpus=0)
def _read_bucket(directory: str, index: int) -> bytes:
    return (Path(directory) / f"{index:04d}.bin").read_bytes()


class WeightCopies:
    """Copies versions between nodes; one instance serves all workers of a pool."""

    def __init__(self) -> None:
        self._copies: dict[tuple[str, str], asyncio.Future[None]] = {}
        self._buckets: OrderedDict[tuple[str, int], Any] = OrderedDict()

    async def ensure(self, directory: str, source_node_id: str, node_id: str, call: CallWorker) -> None:
        """Return when the version in `directory` of `source_node_id` is in the same directory of `node_id`.

        The first worker of a node copies, the others wait. If it fails, the next one copies.

        Args:
            call: Call a method of a worker on `node_id`.

        Raises:
            Exception: Errors of `call`, if this worker copied.
        """
        key = (node_id, directory)
        while (other := self._copies.get(key)) is not None:
            await asyncio.wait({other})
            if not other.cancelled() and other.exception() is None:
                return
        copy = self._copies[key] = asyncio.ensure_future(self._copy(directory, source_node_id, call))
        try:
            await copy
        except BaseException:
            self._copies.pop(key, None)
            copy.cancel()
            raise
        for old in [old for old in self._copies if old[0] == node_id and old != key]:
            del self._copies[old]  # a store keeps the newest version only

    async def _copy(self, directory: str, source_node_id: str, call: CallWorker) -> None:
        on_source = NodeAffinitySchedulingStrategy(source_node_id, soft=False)
        manifest = await _read_manifest.options(scheduling_strategy=on_source).remote(directory)
        count = len(WeightManifest.from_json(manifest).bucket_bytes)
        for index in range(count):
            bucket = self._read(directory, index, on_source)
            if index + 1 < count:
                self._read(directory, index + 1, on_source)  # while this bucket is written
            await call("stage_weights", directory, manifest, index, bucket)
        await call("commit_weights", directory, manifest)

    def _read(self, directory: str, index: int, on_source: NodeAffinitySchedulingStrategy) -> Any:
        """Return a reference to a bucket, shared with nodes that read it at the same time."""
        key = (directory, index)
        if key not in self._buckets:
            self._buckets[key] = _read_bucket.options(scheduling_strategy=on_source).remote(directory, index)
        while len(self._buckets) > _SHARED_BUCKETS:
            self._buckets.popitem(last=False)
        return self._buckets[key]
