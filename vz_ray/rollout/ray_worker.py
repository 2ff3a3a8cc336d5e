"""Rollout workers as Ray actors, and transfer of weights between nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray.exceptions import ActorUnavailableError, ObjectLostError, RayActorError, RayError, RayTaskError

from vz_ray.config.episode import EpisodeConfig
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, SamplingParams, Trajectory
from vz_ray.rollout.engine_stats import WorkerCapacity
from vz_ray.rollout.rollout_worker import RolloutWorker, WorkerSetup, WorkerStats
from vz_ray.rollout.vllm_process import EngineFailedError
from vz_ray.rollout.weight_copies import WeightCopies
from vz_ray.rollout.worker_bundles import WorkerBundles
from vz_ray.rollout.worker_handle import WorkerLostError, WorkerUnschedulableError
from vz_ray.utils.code_fingerprint import check_same_code, code_fingerprint
from vz_ray.utils.placement import explain_unschedulable, node_group_resources
from vz_ray.utils.timeouts import StepTimeout, with_timeout
from vz_ray.weight_sync import RemoteEngineClient, WeightManifest, WeightStore, WeightUpdate

_SHUTDOWN_TIMEOUT_S = 45.0
_MAX_REASON_CHARS = 300
"""Maximum length of Ray's description of an actor death; the rest is general advice."""
MARKET_TYPE_LABEL = "ray.io/market-type"
"""Ray node label; `spot` or `on-demand`."""


class RolloutWorkerActor(RolloutWorker):
    """Rollout worker as a Ray actor. It accepts its setup after the code check of `check_in`."""

    def __init__(self, name: str) -> None:
        self.name, self._engine = name, None

    def check_in(self, driver_fingerprint: Mapping[str, str]) -> tuple[str, bool]:
        """Return the Ray id of the node, and whether the node is preemptible.

        Raises:
            UserError: The node runs a different version of the code than the driver.
        """
        check_same_code(driver_fingerprint, self.name, ray.util.get_node_ip_address())
        context = ray.get_runtime_context()
        return str(context.get_node_id()), context.get_node_labels().get(MARKET_TYPE_LABEL) == "spot"

    async def run_episode_with_capacity(
        self,
        task: Task,
        episode_id: EpisodeId,
        sampling_params: SamplingParams,
        episode_config: EpisodeConfig | None,
        completed_turns: bytes,
    ) -> tuple[Trajectory, WorkerCapacity]:
        """Run an episode and return the remaining capacity with it."""
        trajectory = await self.run_episode(task, episode_id, sampling_params, episode_config, completed_turns)
        return trajectory, self.capacity()

    def configure(self, setup: WorkerSetup) -> None:
        super().__init__(self.name, setup)

    def stage_weights(self, directory: str, manifest: str, index: int, bucket: bytes) -> None:
        """Write a bucket of a version of another node for the same path on this node."""
        WeightStore(Path(directory).parent).stage_bucket(WeightManifest.from_json(manifest), index, bucket)

    def commit_weights(self, directory: str, manifest: str) -> None:
        """Complete a version whose buckets are staged."""
        WeightStore(Path(directory).parent).commit_staged(WeightManifest.from_json(manifest))


class RayWorkerClient(RemoteEngineClient):
    """`WorkerClient` of a rollout worker actor.

    Args:
        name: Name of the worker.
        setup: Sent to the actor.
        gpus: Whether the engine needs GPUs.
        bundles: Bundles that workers share with learner ranks; None places the worker on any node with free
            resources.
        copies: Shared by the workers of a pool.
    """

    actor_type: ClassVar[type[RolloutWorkerActor]] = RolloutWorkerActor
    section: ClassVar[str] = "rollout"
    """Config section of the worker, for errors."""

    def __init__(
        self,
        name: str,
        setup: WorkerSetup,
        *,
        gpus: bool = False,
        bundles: WorkerBundles | None = None,
        copies: WeightCopies | None = None,
    ) -> None:
        self._copies = copies or WeightCopies()
        self.name, self._setup, self._bundles = name, setup, bundles
        self.learner_rank, self._bundle = 0, -1
        self.capacity: WorkerCapacity | None = None
        self.pulls_weights = False
        self._node_id = ""
        config = setup.rollout
        self._resources = {"CPU": config.cpus_per_worker}
        if gpus:
            self._resources["GPU"] = config.engine.tensor_parallel_size * setup.gpu_share
        self._placement_timeout_s, self._node_group = config.start_timeout_s / 2, config.node_group
        self._actor: Any = None

    async def _create_actor(self) -> None:
        """Create the actor, in the bundle of a learner rank if there are bundles."""
        strategy: Any = None
        if self._bundles is not None:
            self._bundle = self.learner_rank = await self._bundles.take()
            strategy = await self._bundles.scheduling_strategy(self._bundle)
        config = self._setup.rollout
        actor = ray.remote(self.actor_type).options(
            num_cpus=config.cpus_per_worker,
            num_gpus=self._resources.get("GPU", 0),
            resources=node_group_resources(config.node_group),
            scheduling_strategy=strategy,
            max_restarts=0,
            max_task_retries=0,
            # Pauses and health checks must get through while all episode slots are in use.
            max_concurrency=4 * config.max_concurrent_episodes + 64,
        )
        self._actor = actor.remote(self.name)

    async def _place(self) -> tuple[str, bool]:
        await self._create_actor()
        return await self._call("check_in", code_fingerprint())

    async def start(self) -> None:
        """Wait for placement, at most half of the start timeout, then start the engine."""
        try:
            self._node_id, self.pulls_weights = await with_timeout(
                self._place(),
                self._placement_timeout_s,
                target="Ray",
                operation=f"placing {self.name}",
            )
        except StepTimeout as error:
            explanation = explain_unschedulable(
                self._resources,
                *await asyncio.to_thread(_node_resources),
                resource_keys={
                    "GPU": f"{self.section}.engine.tensor_parallel_size",
                    "CPU": f"{self.section}.cpus_per_worker",
                },
                count_key=f"{self.section}.num_workers and {self.section}.max_workers",
                node_group=self._node_group,
                node_group_key=f"{self.section}.node_group",
            )
            needs = " and ".join(f"{amount:g} {name}" for name, amount in self._resources.items())
            raise WorkerUnschedulableError(
                f"{self.name} found no place within {self._placement_timeout_s:g} s: "
                f"it needs {needs} on one node, and {explanation}"
            ) from error
        await self._call("configure", self._setup)
        await self._call("start")

    async def run_episode(
        self,
        task: Task,
        episode_id: EpisodeId,
        sampling_params: SamplingParams,
        episode_config: EpisodeConfig | None,
        completed_turns: bytes = b"",
    ) -> Trajectory:
        trajectory, self.capacity = await self._call(
            "run_episode_with_capacity", task, episode_id, sampling_params, episode_config, completed_turns
        )
        return trajectory

    async def read_completed_turns(self) -> dict[EpisodeId, bytes]:
        return await self._call("read_completed_turns")

    async def call_engine(self, method: str, *args: Any) -> Any:
        return await self._call("call_engine", method, *args)

    async def receive_weights(self, update: WeightUpdate) -> None:
        """Load new weights. If they are in shared memory of another node, copy them first."""
        directory = update.transfer_info.get("directory")
        source_node_id = update.node_id or str(ray.get_runtime_context().get_node_id())
        if directory is not None and self._node_id != source_node_id:
            await self._copies.ensure(directory, source_node_id, self._node_id, self._call)
        await super().receive_weights(update)

    async def check_health(self) -> None:
        self.capacity = await self._call("check_health")

    async def drain_reason(self) -> str:
        draining = await asyncio.to_thread(_draining_nodes)
        return "its node is preempted or drained" if self._node_id in draining else ""

    async def worker_stats(self) -> WorkerStats:
        return await self._call("worker_stats")

    async def describe_state(self) -> tuple[str, str]:
        return await self._call("describe_state")

    async def terminate(self) -> None:
        """Shut the engine down if the worker responds, then kill the actor."""
        try:
            if self._node_id:  # an actor without a node has no process and would wait for placement
                await with_timeout(
                    self._call("shutdown"), _SHUTDOWN_TIMEOUT_S, target=self.name, operation="shutting down"
                )
        finally:
            if self._actor is not None:
                ray.kill(self._actor, no_restart=True)
            if self._bundles is not None and self._bundle >= 0:
                self._bundles.give_back(self._bundle)
                self._bundle = -1

    async def _call(self, method: str, *args: Any) -> Any:
        """Call the actor and re-raise its exceptions.

        Raises:
            WorkerLostError: The actor has died, was preempted with its node or is unreachable, or its
                result was lost. The call may have taken effect.
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
            # call_engine("pause") is reported as pause.
            operation = args[0] if method == "call_engine" else method
            raise WorkerLostError(
                f"{self.name} {_describe_death(error)} during {operation}: {_short_reason(error)}"
            ) from error


def _describe_death(error: RayError) -> str:
    """Describe what happened to the actor.

    An unreachable actor may still be alive behind a network partition. It counts as lost, because the
    results of its calls are lost and its episodes are retried elsewhere.
    """
    if isinstance(error, ActorUnavailableError):
        return "could not be reached"
    if isinstance(error, ObjectLostError):
        return "was lost with its result"
    if isinstance(error, RayActorError) and error.preempted:
        return "was preempted with its node"
    return "died"


def _short_reason(error: RayError) -> str:
    """Return Ray's description in one line, without actor ids and general advice."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return lines[-1]  # of a traceback
    return (" ".join(lines[1:2]) or lines[0] if lines else type(error).__name__)[:_MAX_REASON_CHARS]


def _draining_nodes() -> Mapping[str, int]:
    """Return the Ray ids of nodes that are preempted or drained by the autoscaler."""
    from ray._private.state import state  # no public API

    return state.get_draining_nodes()


def _node_resources() -> tuple[list[Mapping[str, float]], list[Mapping[str, float]]]:
    """Return the total and the free resources of each node that is not draining."""
    from ray._private.state import available_resources_per_node  # the public API returns only the sum

    draining, free = _draining_nodes(), available_resources_per_node()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
    return [node["Resources"] for node in nodes], [free.get(node["NodeID"], {}) for node in nodes]
