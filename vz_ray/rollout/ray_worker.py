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
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, SamplingParams, Trajectory
from vz_ray.rollout.engine_stats import WorkerCapacity
from vz_ray.rollout.rollout_worker import RolloutWorker, WorkerSetup, WorkerStats
from vz_ray.rollout.vllm_engine import EngineFailedError
from vz_ray.rollout.worker_handle import WorkerLostError, WorkerUnschedulableError
from vz_ray.utils.code_fingerprint import check_same_code, code_fingerprint
from vz_ray.utils.placement import explain_unschedulable, node_group_resources
from vz_ray.utils.timeouts import StepTimeout, with_timeout
from vz_ray.weight_sync import ParityProbe, WeightManifest, WeightStore, WeightUpdate
from vz_ray.weight_sync.backends import gpu_fraction
from vz_ray.weight_sync.weight_store import MANIFEST_NAME

_SHUTDOWN_TIMEOUT_S = 45.0
RESOURCE_KEYS = {"GPU": "rollout.engine.tensor_parallel_size", "CPU": "rollout.cpus_per_worker"}
"""What sets how much of a resource a worker needs."""
_MAX_REASON_CHARS = 300
"""Most characters of Ray's own account of a death; the rest is general advice."""
MARKET_TYPE_LABEL = "ray.io/market-type"
"""Ray's label of nodes, `spot` or `on-demand`."""


class RolloutWorkerActor(RolloutWorker):
    """A rollout worker that knows its node, and is told what to do only if it runs the driver's code."""

    def __init__(self, name: str) -> None:
        self.name, self._engine = name, None

    def check_in(self, driver_fingerprint: Mapping[str, str]) -> tuple[str, bool]:
        """Ray's id of its node, and whether the cloud may reclaim that.

        Raises:
            UserError: The node has another version of the code than `driver_fingerprint`, its fingerprint.
        """
        check_same_code(driver_fingerprint, self.name, ray.util.get_node_ip_address())
        here = ray.get_runtime_context()
        return str(here.get_node_id()), here.get_node_labels().get(MARKET_TYPE_LABEL) == "spot"

    async def run_episode_with_capacity(
        self,
        task: Task,
        episode_id: EpisodeId,
        sampling_params: SamplingParams,
        episode_config: EpisodeConfig | None,
    ) -> tuple[Trajectory, WorkerCapacity]:
        """An episode, and what could be taken in after it."""
        return await self.run_episode(task, episode_id, sampling_params, episode_config), self.capacity()

    def configure(self, setup: WorkerSetup) -> None:
        super().__init__(self.name, setup)

    def install_weights(self, directory: str, manifest: str, *buckets: bytes) -> None:
        """Writes a version that was fetched from another node to the same place on this one."""
        WeightStore(Path(directory).parent).install(WeightManifest.from_json(manifest), buckets)


class RayWorkerClient:
    """A `WorkerClient` of the fleet; its engine runs on GPUs if `gpus`."""

    actor_type: ClassVar[type[RolloutWorkerActor]] = RolloutWorkerActor

    def __init__(self, name: str, setup: WorkerSetup, *, gpus: bool = False) -> None:
        self.name, self._setup = name, setup
        self.capacity: WorkerCapacity | None = None
        self.pulls_weights = False
        self._node_id = ""
        config = setup.rollout
        self._resources = {"CPU": config.cpus_per_worker}
        if gpus:
            self._resources["GPU"] = config.engine.tensor_parallel_size * gpu_fraction(setup.transport)
        self._placement_timeout_s, self._node_group = config.start_timeout_s / 2, config.node_group
        actor = ray.remote(self.actor_type).options(
            num_cpus=config.cpus_per_worker,
            num_gpus=self._resources.get("GPU", 0),
            resources=node_group_resources(config.node_group),
            max_restarts=0,
            max_task_retries=0,
            # Methods that pause or check must get through while all episodes play.
            max_concurrency=4 * config.max_concurrent_episodes + 64,
        )
        self._actor: Any = actor.remote(name)

    async def start(self) -> None:
        """Waits for a place in the cluster, half the time that a start may take; then starts the engine."""
        try:
            self._node_id, self.pulls_weights = await with_timeout(
                self._call("admit", code_fingerprint()),
                self._placement_timeout_s,
                target="Ray",
                operation=f"placing {self.name}",
            )
        except StepTimeout as error:
            needs = " and ".join(f"{amount:g} {name}" for name, amount in self._resources.items())
            raise WorkerUnschedulableError(
                f"{self.name} found no place within {self._placement_timeout_s:g} s: it needs {needs} on one node, and "
                + explain_unschedulable(
                    self._resources,
                    *await asyncio.to_thread(_node_resources),
                    resource_keys=RESOURCE_KEYS,
                    count_key="rollout.num_workers and rollout.max_workers",
                    node_group=self._node_group,
                    node_group_key="rollout.node_group",
                )
            ) from error
        await self._call("prepare", self._setup)
        await self._call("start")

    async def run_episode(
        self,
        task: Task,
        episode_id: EpisodeId,
        sampling_params: SamplingParams,
        episode_config: EpisodeConfig | None,
    ) -> Trajectory:
        trajectory: Trajectory
        trajectory, self.capacity = await self._call(
            "play_and_tell", task, episode_id, sampling_params, episode_config
        )
        return trajectory

    async def pause(self) -> None:
        await self._call("pause")

    async def receive_weights(self, update: WeightUpdate) -> None:
        directory = update.transfer_info.get("directory")
        there = update.node_id or str(ray.get_runtime_context().get_node_id())
        if directory is not None and self._node_id != there:
            await self._call("adopt", directory, *await fetch_weights(directory, there))
        await self._call("receive_weights", update)

    async def init_weight_transfer(self, info: dict[str, Any]) -> None:
        await self._call("init_weight_transfer", info)

    async def resume_engine(self) -> None:
        await self._call("resume_engine")

    async def score_probe(self, probe: ParityProbe) -> Sequence[float]:
        scored: Sequence[float] = await self._call("logprobs", probe)
        return scored

    async def resume(self) -> None:
        await self._call("resume")

    async def check_health(self) -> None:
        self.capacity = await self._call("check_health")

    async def drain_reason(self) -> str:
        leaving = await asyncio.to_thread(_draining_nodes)
        return "its node is about to go" if self._node_id in leaving else ""

    async def worker_stats(self) -> WorkerStats:
        stats: WorkerStats = await self._call("worker_stats")
        return stats

    async def describe_state(self) -> tuple[str, str]:
        found: tuple[str, str] = await self._call("describe_state")
        return found

    async def terminate(self) -> None:
        """Shuts the engine down if the worker still answers; kills the actor in any case."""
        try:
            if self._node_id:  # else it has no process yet, and would go on asking for a place
                await with_timeout(
                    self._call("shutdown"), _SHUTDOWN_TIMEOUT_S, target=self.name, operation="shutting down"
                )
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
            if isinstance(cause, EngineFailedError):
                raise WorkerLostError(f"{self.name}: {cause}") from error
            raise cause from error
        except RayError as error:
            raise WorkerLostError(
                f"{self.name} {_describe_death(error)} during {method}: {_short_reason(error)}"
            ) from error


def _describe_death(error: RayError) -> str:
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


def _short_reason(error: RayError) -> str:
    """Ray's own account in one line: without the actor's ids, and without general advice."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return lines[-1]  # a traceback
    return (" ".join(lines[1:2]) or lines[0] if lines else type(error).__name__)[:_MAX_REASON_CHARS]


def _draining_nodes() -> Mapping[str, int]:
    """Ray's ids of the nodes that are being drained: reclaimed by the cloud, or idle and let go."""
    from ray._private.state import state  # Ray offers it nowhere else

    draining: Mapping[str, int] = state.get_draining_nodes()
    return draining


def _node_resources() -> tuple[list[Mapping[str, float]], list[Mapping[str, float]]]:
    """What each node that stays has, and what of it is free."""
    from ray._private.state import available_resources_per_node  # Ray offers only their sum

    leaving, free = _draining_nodes(), available_resources_per_node()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    return [node["Resources"] for node in nodes], [free.get(node["NodeID"], {}) for node in nodes]


# Made once: Ray keeps something of every remote function there ever was.
@ray.remote(num_cpus=0)
def _read_manifest(directory: str) -> str:
    return (Path(directory) / MANIFEST_NAME).read_text()


@ray.remote(num_cpus=0)
def _read_buckets(directory: str, count: int) -> bytes | tuple[bytes, ...]:
    buckets = tuple((Path(directory) / f"{index:04d}.bin").read_bytes() for index in range(count))
    return buckets[0] if count == 1 else buckets


async def fetch_weights(directory: str, node_id: str) -> tuple[Any, ...]:
    """References to a version's manifest and bucket files, read on `node_id`.

    Ray moves each file to a node once, however many workers there want it.
    """
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    manifest = _read_manifest.options(scheduling_strategy=there).remote(directory)
    count = len(WeightManifest.from_json(await manifest).bucket_bytes)
    buckets = _read_buckets.options(scheduling_strategy=there, num_returns=count).remote(directory, count)
    return (manifest, *([buckets] if count == 1 else buckets))
