"""One rank of the learner as a Ray actor: the methods of `Trainer`, with pixels from a frame source.

Each rank fetches the frames of its share. Rank 0 writes weights, checkpoints and exports, while all
ranks gather.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vz_ray.config.learner import LearnerConfig
from vz_ray.env.protocols import FrameSource
from vz_ray.env.trajectory import Group, Trajectory
from vz_ray.learner.example import frame_key
from vz_ray.learner.frame_cache import CachedFrameLoader
from vz_ray.monitoring.log_context import RunIdentity, set_log_context
from vz_ray.monitoring.logging_config import configure_actor_logging, redirect_output
from vz_ray.utils.code_fingerprint import check_same_code
from vz_ray.utils.memory_file import Flag
from vz_ray.utils.ports import find_free_port
from vz_ray.utils.stack_dump import StackDumper, dump_stacks, install_stack_dumper
from vz_ray.utils.timeouts import with_timeout
from vz_ray.video.errors import VideoError
from vz_ray.weight_sync import ParityProbe, ProbeScore, WeightUpdate
from vz_ray.weight_sync.ipc_handles import IpcExporter
from vz_ray.weight_sync.nccl_broadcast import (
    BUCKET_BYTES,
    NcclBroadcaster,
    NcclTopology,
    update_info,
)
from vz_ray.weight_sync.weight_source import CollectiveSource
from vz_ray.weight_sync.weight_store import WeightIntegrityError, WeightStore

T = TypeVar("T")

log = logging.getLogger(__name__)

_BROADCAST_POLL_S = 0.2
"""Maximum wait of one `broadcast_done` call; between calls the rank can receive `abort_broadcast`."""
_ABORT_TIMEOUT_S = 30.0
"""Maximum time until an aborted broadcast has failed."""
_REPORT_TIMEOUT_S = 30.0
"""A busy node can need most of this time to start a process for the task."""


def actor_name(rank: int) -> str:
    """Return the name of a rank in errors and logs."""
    return f"learner-rank-{rank}"


@dataclass(frozen=True, slots=True)
class RankProcess:
    """Reaches the process of a rank during a call.

    A rank runs one call at a time and can be stuck in C code, such as a collective, so another actor call
    would not reach it. A Ray task on the rank's node does.

    Attributes:
        node_id: Ray's id of the node.
        stacks: Writes the stacks of the process.
        stop: Asks the rank to stop during a GRPO step.
    """

    node_id: str
    stacks: StackDumper
    stop: Flag

    async def report(self, name: str) -> tuple[str, str]:
        """Return the current function of the rank `name`, and the stacks of its threads.

        Raises:
            StackDumpError: The process is gone or wrote no stacks.
            StepTimeout: The task did not finish within 30 s.
        """
        return await self._run_on_node(dump_stacks, self.stacks, name, "a stack dump")

    async def request_stop(self, name: str) -> None:
        """Set the stop flag of the rank `name`.

        Raises:
            ProcessEndedError: The process is gone.
            StepTimeout: The task did not finish within 30 s.
        """
        await self._run_on_node(Flag.set, self.stop, name, "a request to stop")

    async def _run_on_node(self, function: Callable[[Any], T], argument: Any, name: str, operation: str) -> T:
        on_node = NodeAffinitySchedulingStrategy(self.node_id, soft=False)
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=on_node)(function)
        try:
            return await with_timeout(
                task.remote(argument), _REPORT_TIMEOUT_S, target=f"the node of {name}", operation=operation
            )
        except RayTaskError as error:
            raise error.cause from error


@ray.remote(max_restarts=0, max_task_retries=0)
class LearnerActor:
    """One rank. Every method must be called on all ranks with the same arguments; calls run in order.

    Args:
        identity: Run name and log format.
        log_dir: Directory of the rank's log file; if empty, Ray handles the output.
    """

    def __init__(
        self,
        rank: int,
        identity: RunIdentity = RunIdentity(),  # noqa: B008 - frozen
        log_dir: str = "",
    ) -> None:
        if log_dir:
            redirect_output(Path(log_dir) / f"{actor_name(rank)}.log")
        self._rank, self._identity = rank, identity
        configure_actor_logging(actor_name(rank), identity, rank)
        self._stop = Flag.create("stop")
        self._nccl, self._exporter = NcclBroadcaster(), IpcExporter()
        self._announced = (-1, -1)  # weight version, optimizer step
        self._broadcast_thread = ThreadPoolExecutor(1, thread_name_prefix="broadcast")
        self._broadcast: Future[None] = Future()
        self._broadcast.set_result(None)

    def register(self, driver_fingerprint: Mapping[str, str]) -> RankProcess:
        """Check the code version and return what reaches this process during a call.

        Raises:
            UserError: The code on this node differs from the driver's.
        """
        check_same_code(driver_fingerprint, actor_name(self._rank), ray.util.get_node_ip_address())
        return RankProcess(ray.get_runtime_context().get_node_id(), install_stack_dumper(), self._stop)

    def rendezvous_address(self) -> tuple[str, int]:
        """Return the IP address of this node and a free port."""
        return ray.util.get_node_ip_address(), find_free_port()

    def setup(self, config: LearnerConfig, frame_source: FrameSource, address: str, port: int) -> None:
        """Join the process group and load the model."""
        self._config = config
        self._frames = CachedFrameLoader(frame_source, config.frame_cache_bytes, config.timeout_s)
        os.environ |= {
            "RANK": str(self._rank),
            "WORLD_SIZE": str(self._config.world_size),
            # Ray hides other actors' GPUs, so this actor's GPU always has index 0.
            "LOCAL_RANK": "0",
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }
        import deepspeed  # noqa: F401 - its import adds a log handler, which is replaced below

        from vz_ray.learner.trainer import Trainer

        configure_actor_logging(actor_name(self._rank), self._identity, self._rank)
        self._trainer = Trainer(self._config)
        log.info("Loaded %s on rank %d of %d", config.model, self._rank, config.world_size)

    def ping(self) -> None:
        """Return when the process is alive and idle."""

    def sft_step(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        set_log_context(step=self._trainer.engine.steps + 1)
        metrics = self._trainer.sft_step(trajectories, self._frames) | self._frames.take_metrics()
        log.info("Trained on %d trajectories in %.2f s", len(trajectories), metrics["seconds"])
        return metrics

    def find_unreadable(self, groups: Sequence[Group]) -> dict[int, str]:
        """Check this rank's part of `groups`; return the decode error of each unreadable group by index."""
        _set_log_step(groups)
        errors = {}
        for index in range(self._rank, len(groups), self._config.world_size):
            trajectories = groups[index].trajectories
            refs = {frame_key(ref): ref for trajectory in trajectories for ref in trajectory.frame_refs}
            try:
                self._frames(list(refs.values()))
            except VideoError as error:
                errors[index] = str(error)
        return errors

    def grpo_step(self, groups: Sequence[Group], weight_version: int | None) -> dict[str, float]:
        _set_log_step(groups)
        metrics = self._trainer.grpo_step(groups, self._frames, weight_version, self._stop.is_set)
        metrics |= self._frames.take_metrics()
        log.info("Trained on %d groups in %.2f s", metrics["groups"], metrics.get("seconds", 0.0))
        return metrics

    def compute_logprobs(self, trajectories: Sequence[Trajectory]) -> list[NDArray[np.float32]]:
        return self._trainer.compute_logprobs(trajectories, self._frames)

    def score_probe(self, probe: ParityProbe) -> ProbeScore:
        return self._trainer.score_probe(probe)

    def save_checkpoint(self, directory: Path) -> None:
        self._trainer.save_checkpoint(directory)

    def load_checkpoint(self, directory: Path) -> None:
        self._trainer.load_checkpoint(directory)

    def export_hf(self, directory: Path) -> None:
        self._trainer.export_hf(directory)

    def write_weights(
        self, version: int, root: Path, bucket_bytes: int, probe: ParityProbe | None
    ) -> WeightUpdate | None:
        """Write the weights to shared memory on rank 0, while all ranks gather.

        Returns:
            The update on rank 0, None on other ranks.
        """
        source = CollectiveSource(self._trainer.published_source(), bucket_bytes)
        update = None
        with source.gathered_to_the_end():
            if self._rank == 0:
                store = WeightStore(root, bucket_bytes=bucket_bytes)
                manifest = store.write_version(version, source)
                checksum = manifest.checksum
                info = {"directory": str(store.path(version)), "checksum": checksum}
                node_id = str(ray.get_runtime_context().get_node_id())
                update = WeightUpdate(version, checksum, info, manifest.nbytes, node_id=node_id)
        expected = self._score(probe)
        return None if update is None else replace(update, probe_score=expected)

    def write_copy(self, version: int, root: Path, bucket_bytes: int) -> WeightUpdate | None:
        """Write the announced weights to shared memory; see `write_weights`.

        Raises:
            WeightIntegrityError: The weights changed since they were announced. Nothing is written.
        """
        self._check_announced(version)
        return self.write_weights(version, root, bucket_bytes, None)

    def announce_weights(self, version: int, probe: ParityProbe | None) -> WeightUpdate:
        """Describe the current weights as `version` for a transfer by NCCL or in parts."""
        info, nbytes = update_info(self._trainer.published_source())
        return self._announce(WeightUpdate(version, "", info, nbytes, self._score(probe)))

    def start_export(self, version: int, bucket_bytes: int) -> None:
        """Start to export the announced weights for the engine on this rank's GPU.

        Raises:
            WeightIntegrityError: The weights changed since `announce_weights`.
        """
        self._check_announced(version)
        self._exporter.start(self._trainer.published_source(), bucket_bytes)

    def export_part(self, receivers: frozenset[int]) -> dict[str, Any] | None:
        """Return the handles of the next bucket, which all ranks gather; None after the last one.

        Args:
            receivers: Ranks whose engine still receives; the others export nothing.
        """
        return self._exporter.next_part(has_receiver=self._rank in receivers)

    def stop_export(self) -> None:
        """End the export and free its bucket."""
        self._exporter.stop()

    def offload_states(self, keep_weights: bool) -> None:
        """Move the learner's states to host memory, with `keep_weights` except the weights."""
        started_at = time.monotonic()
        num_bytes = self._trainer.offload_states(keep_weights=keep_weights)
        log.info("Moved %.2f GB to host memory in %.2f s", num_bytes / 1e9, time.monotonic() - started_at)

    def load_states(self) -> None:
        """Move offloaded states back to the device."""
        started_at = time.monotonic()
        num_bytes = self._trainer.load_states()
        log.info("Moved %.2f GB to the device in %.2f s", num_bytes / 1e9, time.monotonic() - started_at)

    def _announce(self, update: WeightUpdate) -> WeightUpdate:
        self._announced = (update.version, self._trainer.engine.steps)
        return update

    def _check_announced(self, version: int) -> None:
        """Raise `WeightIntegrityError` unless the weights are still those that were announced as `version`."""
        current = (version, self._trainer.engine.steps)
        if current != self._announced:
            raise WeightIntegrityError(
                f"weight version {version} cannot be sent: the learner is at step {current[1]} and announced "
                f"version {self._announced[0]} at step {self._announced[1]}"
            )

    def _score(self, probe: ParityProbe | None) -> ProbeScore | None:
        return None if probe is None else self._trainer.score_probe(probe)

    def init_nccl_group(self, topology: NcclTopology) -> None:
        """Open the NCCL group on rank 0; the engines join at the same time."""
        if self._rank == 0:
            self._nccl.open(topology)

    def start_broadcast(self, version: int) -> None:
        """Broadcast the announced weights from rank 0, while all ranks gather.

        The broadcast runs in a thread, so that the rank can receive `abort_broadcast`.

        Raises:
            WeightIntegrityError: The weights changed since `announce_weights`.
        """
        self._check_announced(version)
        self._broadcast = self._broadcast_thread.submit(self._send_weights)

    def _send_weights(self) -> None:
        source = self._trainer.published_source()
        if self._rank == 0:
            self._nccl.broadcast(source)
        else:
            for _ in source.buckets(BUCKET_BYTES):
                continue

    def broadcast_done(self) -> bool:
        """Wait up to 0.2 s and return whether the broadcast has finished; raise its error."""
        wait([self._broadcast], timeout=_BROADCAST_POLL_S)
        if self._broadcast.done():
            self._broadcast.result()
        return self._broadcast.done()

    def abort_broadcast(self) -> None:
        """Close the NCCL group on rank 0, so that a broadcast with a missing peer fails. Wait until it has failed."""
        if self._rank == 0:
            self._nccl.abort()
            if wait([self._broadcast], timeout=_ABORT_TIMEOUT_S).not_done:
                raise TimeoutError(f"the aborted broadcast did not end within {_ABORT_TIMEOUT_S:g} s")


def _set_log_step(groups: Sequence[Group]) -> None:
    """Set the step of the groups' trajectories in the log context."""
    steps = [trajectory.id.step for group in groups for trajectory in group.trajectories]
    if steps:
        set_log_context(step=max(steps))
