"""One rank of the learner as a Ray actor: `Trainer`'s methods, and the pixels that they need.

FrameSource.resolve(refs of the rank's own share) ---> pixels
rank 0 writes what all ranks gather: weights, checkpoints, exports
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray
from numpy.typing import NDArray

from vz_ray.config.learner import LearnerConfig
from vz_ray.env.protocols import FrameSource
from vz_ray.env.trajectory import Group, Trajectory
from vz_ray.learner.example import frame_key
from vz_ray.learner.frame_cache import CachedFrameLoader
from vz_ray.learner.hang_report import HangReporter, actor_name
from vz_ray.monitoring.log_context import RunIdentity, set_log_context
from vz_ray.monitoring.logging_config import configure_actor_logging, redirect_output
from vz_ray.utils.code_fingerprint import check_same_code
from vz_ray.utils.stack_dump import install_stack_dumper
from vz_ray.video.frame import VideoError
from vz_ray.weight_sync import WeightUpdate
from vz_ray.weight_sync.ipc_handles import IpcHandles
from vz_ray.weight_sync.nccl_broadcast import (
    BUCKET_BYTES,
    NcclBroadcaster,
    NcclTopology,
    find_free_port,
    update_info,
)
from vz_ray.weight_sync.parity_probe import ParityProbe
from vz_ray.weight_sync.weight_store import WeightIntegrityError, WeightStore

log = logging.getLogger(__name__)


def _turn_to(groups: Sequence[Group]) -> None:
    """Log lines are about the iteration that these were played for, from now on."""
    played = [trajectory.id.step for group in groups for trajectory in group.trajectories]
    if played:
        set_log_context(iteration=max(played))


_STEP_S = 0.2
"""How long a rank waits for its broadcast before it listens to whoever wants to abort it."""


@ray.remote(max_restarts=0, max_task_retries=0)
class LearnerActor:
    """One rank. Calls must be made on all ranks alike; they run one at a time.

    Args:
        badge: Which run it logs for, and how.
        logs: Directory of the file that keeps what it prints; empty leaves that to Ray.
    """

    def __init__(self, rank: int, badge: RunIdentity = RunIdentity(), log_dir: str = "") -> None:  # noqa: B008 - frozen
        if log_dir:
            redirect_output(Path(log_dir) / f"{actor_name(rank)}.log")
        self._rank, self._badge = rank, badge
        configure_actor_logging(actor_name(rank), badge, rank)
        self._nccl, self._announced, self._loans = NcclBroadcaster(), (-1, -1), IpcHandles()
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="broadcast")
        self._sending: Future[None] = Future()

    def admit(self, driver: Mapping[str, str]) -> HangReporter:
        """Where to ask what this rank is doing, should it be late.

        Raises:
            UserError: This node has another version of the code than `driver`, its fingerprint.
        """
        check_same_code(driver, actor_name(self._rank), ray.util.get_node_ip_address())
        return HangReporter(ray.get_runtime_context().get_node_id(), install_stack_dumper())

    def address(self) -> tuple[str, int]:
        """Where the ranks can meet: this node, and a port that is free on it."""
        return ray.util.get_node_ip_address(), find_free_port()

    def start(self, config: LearnerConfig, frames: FrameSource, address: str, port: int) -> None:
        """Joins the other ranks and loads the model."""
        self._config = config
        self._frames = CachedFrameLoader(frames, config.frame_cache_mib * 2**20, config.timeout_s)
        os.environ |= {
            "RANK": str(self._rank),
            "WORLD_SIZE": str(self._config.world_size),
            # Ray shows each actor its own GPUs only, so the first is always its own.
            "LOCAL_RANK": "0",
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }
        import deepspeed  # noqa: F401 - gives its logger a handler of its own

        from vz_ray.learner.trainer import Trainer

        # Once more, in place of that handler.
        configure_actor_logging(actor_name(self._rank), self._badge, self._rank)
        self._trainer = Trainer(self._config)
        log.info("rank %d of %d has loaded %s", self._rank, config.world_size, config.model)

    def check(self) -> None:
        """Answers, if this process lives and has nothing else to do."""

    def sft_step(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        set_log_context(iteration=self._trainer.engine.steps + 1)
        metrics = self._trainer.sft_step(trajectories, self._frames)
        log.info("learned from %d trajectories in %.2f s", len(trajectories), metrics["seconds"])
        return metrics

    def find_unreadable(self, groups: Sequence[Group]) -> dict[int, str]:
        """Those of this rank's part of `groups` whose frames cannot be got again, by index, and why."""
        _turn_to(groups)
        found = {}
        for index in range(self._rank, len(groups), self._config.world_size):
            refs = {frame_key(ref): ref for one in groups[index].trajectories for ref in one.frame_refs}
            try:
                self._frames(list(refs.values()))
            except VideoError as error:
                found[index] = str(error)
        return found

    def grpo_step(self, groups: Sequence[Group], version: int | None) -> dict[str, float]:
        _turn_to(groups)
        metrics = self._trainer.grpo_step(groups, self._frames, version)
        log.info("learned from %d groups in %.2f s", metrics["groups"], metrics.get("seconds", 0.0))
        return metrics

    def compute_logprobs(self, trajectories: Sequence[Trajectory]) -> list[NDArray[np.float32]]:
        return self._trainer.compute_logprobs(trajectories, self._frames)

    def score_probe(self, probe: ParityProbe) -> tuple[float, ...]:
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
        """Rank 0 writes the weights to shared memory and says where; the others gather along."""
        source = self._trainer.weight_source()
        update = None
        if self._rank == 0:
            store = WeightStore(root, bucket_bytes=bucket_bytes)
            manifest = store.write_version(version, source)
            checksum = manifest.version.checksum
            info = {"directory": str(store.path(version)), "checksum": checksum}
            node = str(ray.get_runtime_context().get_node_id())
            update = WeightUpdate(version, checksum, info, manifest.nbytes, node_id=node)
        else:
            for _ in source.buckets(bucket_bytes):
                continue
        expected = self._trainer.score_probe(probe) if probe is not None else None
        if update is None:
            return None
        return replace(update, expected_logprobs=expected)

    def announce_weights(self, version: int, probe: ParityProbe | None) -> WeightUpdate:
        """What the present weights are, as `version`, for engines that will receive them by NCCL."""
        info, nbytes = update_info(self._trainer.weight_source())
        expected = self._trainer.score_probe(probe) if probe is not None else None
        self._announced = (version, self._trainer.engine.steps)
        return WeightUpdate(version, "", info, nbytes, expected)

    def export_ipc_handles(self, version: int, probe: ParityProbe | None) -> WeightUpdate:
        """The present weights, as `version`, for an engine on the same GPU to read them where they are."""
        info, nbytes = self._loans.export(self._trainer.weight_source())
        expected = self._trainer.score_probe(probe) if probe is not None else None
        return WeightUpdate(version, "", info, nbytes, expected)

    def init_nccl_group(self, roster: NcclTopology) -> None:
        """Rank 0 opens the group that the engines, told at the same time, join."""
        if self._rank == 0:
            self._nccl.open(roster)

    def start_broadcast(self, version: int) -> None:
        """Begins to broadcast what was announced: rank 0 sends, the others gather along.

        In a thread, so that the rank can be told to abort it.
        """
        now = (version, self._trainer.engine.steps)
        if now != self._announced:
            raise WeightIntegrityError(
                f"the learner holds step {now[1]}; weight version {version} is not what it announced last "
                f"(version {self._announced[0]} at step {self._announced[1]})"
            )
        self._sending = self._sender.submit(self._send)

    def _send(self) -> None:
        source = self._trainer.weight_source()
        if self._rank == 0:
            self._nccl.broadcast(source)
        else:
            for _ in source.buckets(BUCKET_BYTES):
                continue

    def broadcast_done(self) -> bool:
        """Whether the broadcast is over; waits for it for a moment. Raises what it raised."""
        wait([self._sending], timeout=_STEP_S)
        if self._sending.done():
            self._sending.result()
        return self._sending.done()

    def abort_broadcast(self) -> None:
        """Lets rank 0's part of a broadcast fail that somebody does not take part in any more."""
        if self._rank == 0:
            self._nccl.close()
