"""Rollout workers as Ray actors, and how weights get to nodes that lack them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray.exceptions import ActorUnavailableError, ObjectLostError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.task import Task
from vz_ray.episode.trajectory import EpisodeId, Sampling, Trajectory
from vz_ray.observe.deadline import Overdue, within
from vz_ray.observe.fingerprint import check_same_code, fingerprint
from vz_ray.observe.place import lacking, of_group
from vz_ray.rollout.engine import EngineFailed
from vz_ray.rollout.engine_stats import Room
from vz_ray.rollout.member import NoPlace, WorkerLost
from vz_ray.rollout.worker import RolloutWorker, WorkerSetup, WorkerStats
from vz_ray.weights import Manifest, Probe, Update, WeightStore
from vz_ray.weights.backends import gpu_share
from vz_ray.weights.store import MANIFEST

_END_S = 45.0
NEEDS = {"GPU": "rollout.engine.tensor_parallel", "CPU": "rollout.cpus_per_worker"}
"""What sets how much of a resource a worker needs."""
_REASON = 300
"""Most characters of Ray's own account of a death; the rest is general advice."""
MARKET = "ray.io/market-type"
"""Ray's label of nodes, `spot` or `on-demand`."""


class WorkerActor(RolloutWorker):
    """A rollout worker that knows its node, and is told what to do only if it runs the driver's code."""

    def __init__(self, name: str) -> None:
        self.name, self._engine = name, None

    def admit(self, driver: Mapping[str, str]) -> tuple[str, bool]:
        """Ray's id of its node, and whether the cloud may reclaim that.

        Raises:
            UserError: The node has another version of the code than `driver`, its fingerprint.
        """
        check_same_code(driver, self.name, ray.util.get_node_ip_address())
        here = ray.get_runtime_context()
        return str(here.get_node_id()), here.get_node_labels().get(MARKET) == "spot"

    async def play_and_tell(
        self, task: Task, id: EpisodeId, sampling: Sampling, episode: EpisodeConfig | None
    ) -> tuple[Trajectory, Room]:
        """An episode, and what could be taken in after it."""
        return await self.play_episode(task, id, sampling, episode), self.room()

    def prepare(self, setup: WorkerSetup) -> None:
        super().__init__(self.name, setup)

    def adopt(self, directory: str, manifest: str, *buckets: bytes) -> None:
        """Writes a version that was fetched from another node to the same place on this one."""
        WeightStore(Path(directory).parent).adopt(Manifest.from_json(manifest), buckets)


class RayWorker:
    """A `RemoteWorker` of the fleet; its engine runs on GPUs if `gpus`."""

    actor_type: ClassVar[type[WorkerActor]] = WorkerActor

    def __init__(self, name: str, setup: WorkerSetup, *, gpus: bool = False) -> None:
        self.name, self._setup = name, setup
        self.room: Room | None = None
        self.pulls = False
        self._node = ""
        config = setup.rollout
        self._needs = {"CPU": config.cpus_per_worker}
        if gpus:
            self._needs["GPU"] = config.engine.tensor_parallel * gpu_share(setup.transport)
        self._place_s, self._group = config.start_deadline_s / 2, config.group
        actor = ray.remote(self.actor_type).options(
            num_cpus=config.cpus_per_worker,
            num_gpus=self._needs.get("GPU", 0),
            resources=of_group(config.group),
            max_restarts=0,
            max_task_retries=0,
            # Methods that pause or check must get through while all episodes play.
            max_concurrency=4 * config.episodes_per_worker + 64,
        )
        self._actor: Any = actor.remote(name)

    async def start(self) -> None:
        """Waits for a place in the cluster, half the time that a start may take; then starts the engine."""
        try:
            self._node, self.pulls = await within(
                self._place_s, self._call("admit", fingerprint()), who="Ray", what=f"placing {self.name}"
            )
        except Overdue as error:
            needs = " and ".join(f"{amount:g} {name}" for name, amount in self._needs.items())
            raise NoPlace(
                f"{self.name} found no place within {self._place_s:g} s: it needs {needs} on one node, and "
                + lacking(
                    self._needs,
                    *await asyncio.to_thread(_nodes),
                    keys=NEEDS,
                    fewer="rollout.workers and rollout.max_workers",
                    group=self._group,
                    group_key="rollout.group",
                )
            ) from error
        await self._call("prepare", self._setup)
        await self._call("start")

    async def play_episode(
        self, task: Task, id: EpisodeId, sampling: Sampling, episode: EpisodeConfig | None
    ) -> Trajectory:
        trajectory: Trajectory
        trajectory, self.room = await self._call("play_and_tell", task, id, sampling, episode)
        return trajectory

    async def pause(self) -> None:
        await self._call("pause")

    async def receive(self, update: Update) -> None:
        directory = update.info.get("directory")
        there = update.node or str(ray.get_runtime_context().get_node_id())
        if directory is not None and self._node != there:
            await self._call("adopt", directory, *await fetch(directory, there))
        await self._call("receive", update)

    async def init_weights(self, info: dict[str, Any]) -> None:
        await self._call("init_weights", info)

    async def thaw(self) -> None:
        await self._call("thaw")

    async def score(self, probe: Probe) -> Sequence[float]:
        scored: Sequence[float] = await self._call("logprobs", probe)
        return scored

    async def resume(self) -> None:
        await self._call("resume")

    async def check(self) -> None:
        self.room = await self._call("check")

    async def notice(self) -> str:
        leaving = await asyncio.to_thread(_leaving_nodes)
        return "its node is about to go" if self._node in leaving else ""

    async def stats(self) -> WorkerStats:
        stats: WorkerStats = await self._call("stats")
        return stats

    async def whereabouts(self) -> tuple[str, str]:
        found: tuple[str, str] = await self._call("whereabouts")
        return found

    async def end(self) -> None:
        """Shuts the engine down if the worker still answers; kills the actor in any case."""
        try:
            if self._node:  # else it has no process yet, and would go on asking for a place
                await within(_END_S, self._call("shutdown"), who=self.name, what="shutting down")
        finally:
            ray.kill(self._actor, no_restart=True)

    async def _call(self, method: str, *args: Any) -> Any:
        """Calls the actor; its own errors come as they were raised there.

        Raises:
            WorkerLost: It has died, was reclaimed with its node, could not be reached, or its answer went
                with its node. In each case it may have done what was asked, and nobody will know.
        """
        ref = getattr(self._actor, method).remote(*args)
        try:
            return await ref
        except asyncio.CancelledError:
            ray.cancel(ref)
            raise
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, EngineFailed):
                raise WorkerLost(f"{self.name}: {cause}") from error
            raise cause from error
        except RayError as error:
            raise WorkerLost(f"{self.name} {_fate(error)} during {method}: {_reason(error)}") from error


def _fate(error: RayError) -> str:
    """What Ray's error says of an actor.

    One that cannot be reached may live on behind a broken network. It is lost all the same: the answers
    to all its calls are, and what it goes on to play would be played twice.
    """
    if isinstance(error, ActorUnavailableError):
        return "could not be reached"
    if isinstance(error, ObjectLostError):
        return "was lost with its answer"
    if isinstance(error, RayActorError) and error.preempted:
        return "was reclaimed with its node"
    return "died"


def _reason(error: RayError) -> str:
    """Ray's own account in one line: without the actor's ids, and without general advice."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return lines[-1]  # a traceback
    return (" ".join(lines[1:2]) or lines[0] if lines else type(error).__name__)[:_REASON]


def _leaving_nodes() -> Mapping[str, int]:
    """Ray's ids of the nodes that are being drained: reclaimed by the cloud, or idle and let go."""
    from ray._private.state import state  # Ray offers it nowhere else

    draining: Mapping[str, int] = state.get_draining_nodes()
    return draining


def _nodes() -> tuple[list[Mapping[str, float]], list[Mapping[str, float]]]:
    """What each node that stays has, and what of it is free."""
    from ray._private.state import available_resources_per_node  # Ray offers only their sum

    leaving, free = _leaving_nodes(), available_resources_per_node()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    return [node["Resources"] for node in nodes], [free.get(node["NodeID"], {}) for node in nodes]


# Made once: Ray keeps something of every remote function there ever was.
@ray.remote(num_cpus=0)
def _read_manifest(directory: str) -> str:
    return (Path(directory) / MANIFEST).read_text()


@ray.remote(num_cpus=0)
def _read_buckets(directory: str, count: int) -> bytes | tuple[bytes, ...]:
    buckets = tuple((Path(directory) / f"{index:04d}.bin").read_bytes() for index in range(count))
    return buckets[0] if count == 1 else buckets


async def fetch(directory: str, node: str) -> tuple[Any, ...]:
    """References to a version's manifest and bucket files, read on `node`.

    Ray moves each file to a node once, however many workers there want it.
    """
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    manifest = _read_manifest.options(scheduling_strategy=there).remote(directory)
    count = len(Manifest.from_json(await manifest).bucket_bytes)
    buckets = _read_buckets.options(scheduling_strategy=there, num_returns=count).remote(directory, count)
    return (manifest, *([buckets] if count == 1 else buckets))
