"""Handle of the learner for the driver: one Ray actor per rank, called in lockstep.

    driver: Learner --- trajectories, without pixels ---> LearnerActor 0 .. n-1

Before a GRPO step, all ranks drop the same groups: those with frames that cannot be decoded again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Never, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vz_ray.config.learner import LearnerConfig
from vz_ray.env.protocols import FrameSource
from vz_ray.env.trajectory import Group, Trajectory
from vz_ray.learner.learner_actor import LearnerActor, RankProcess, actor_name
from vz_ray.learner.placement import LearnerPlacement
from vz_ray.monitoring.log_context import RunIdentity
from vz_ray.utils.code_fingerprint import code_fingerprint
from vz_ray.utils.errors import UserError
from vz_ray.utils.placement import node_group_resources
from vz_ray.utils.stack_dump import StackDumpError
from vz_ray.utils.timeouts import StepTimeout, with_timeout
from vz_ray.weight_sync import ParityProbe, ProbeScore

T = TypeVar("T")

log = logging.getLogger(__name__)

_FAILURE_GRACE_S = 90.0
"""After one rank fails, time for another rank's death to become visible as the cause. Ray declares a silent
node dead after five checks of at most 10 s each, 3 s apart."""
_HEALTH_CHECK_INTERVAL_S = 2.0


class LearnerDiedError(RuntimeError):
    """A rank died. The other ranks cannot continue; the learner must be restarted."""


class Learner:
    """All ranks of the learner.

    A dead rank is detected immediately during a call, and within 2 s in `run_with_health_check`. A rank on a
    silent node is detected when Ray declares the node dead, after about a minute by default.

    Args:
        frame_source: A frame source that Ray can serialize, such as the client of the decode pool.
        placement: Resources of the ranks; default: no GPUs.
        identity: Run name and log format of the ranks.
        log_dir: Directory of `learner-rank-<n>.log` on each rank's node; if empty, Ray handles the output.

    Attributes:
        start_count: Number of starts so far.

    Raises (every call):
        LearnerDiedError: A rank died; the message names the rank and the call. Call `restart`, then load a
            checkpoint.
        StepTimeout: A rank did not finish within `config.timeout_s`; the message holds the current function
            of each late rank.
    """

    def __init__(
        self,
        config: LearnerConfig,
        frame_source: FrameSource,
        *,
        placement: LearnerPlacement | None = None,
        identity: RunIdentity = RunIdentity(),  # noqa: B008 - frozen
        log_dir: str = "",
    ) -> None:
        self._config, self._frame_source = config, frame_source
        self._identity, self._log_dir = identity, log_dir
        self._placement = placement or LearnerPlacement(config)
        self._actors: list[Any] = []
        self._processes: list[RankProcess] = []
        self.start_count = 0

    @classmethod
    async def start(cls, config: LearnerConfig, frame_source: FrameSource, **options: Any) -> Learner:
        """Create and start a learner; see `restart`."""
        learner = cls(config, frame_source, **options)
        await learner.restart()
        return learner

    async def restart(self) -> None:
        """Kill the ranks, start new ones in the reserved resources, and load `config.model`.

        Weight transports of this learner continue with the new ranks. Training progress is lost unless a
        checkpoint is loaded.

        Raises:
            StepTimeout: Ray could not place the ranks within `config.timeout_s`.
            UserError: A node runs another version of the code than the driver. See also `Trainer`.
        """
        self._kill_ranks()
        self.start_count += 1
        try:
            group = await self._placement.reserve()
            self._actors = [self._create_actor(group, rank) for rank in range(self._config.world_size)]
            self._processes = await self.call_all("register", code_fingerprint())
            address, port = await self.rendezvous_address()
            await self.call_all("setup", self._config, self._frame_source, address, port)
        except BaseException:
            self.close()
            raise

    def _create_actor(self, group: PlacementGroup, rank: int) -> Any:
        actor_class = LearnerActor.options(  # type: ignore[attr-defined]
            num_cpus=self._config.cpus_per_rank,
            num_gpus=self._placement.gpus_per_rank,
            resources=node_group_resources(self._config.node_group),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            runtime_env={"env_vars": _environment(self._config, self._placement.gpus_per_rank)},
        )
        return actor_class.remote(rank, self._identity, self._log_dir)

    async def run_with_health_check(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`; cancel it and raise `LearnerDiedError` if a rank dies meanwhile."""
        work_task, health_task = asyncio.create_task(work), asyncio.create_task(self._check_health())
        try:
            await asyncio.wait({work_task, health_task}, return_when=asyncio.FIRST_COMPLETED)
            return work_task.result() if work_task.done() else health_task.result()
        finally:
            work_task.cancel()
            health_task.cancel()
            await asyncio.gather(work_task, health_task, return_exceptions=True)

    async def _check_health(self) -> Never:
        while True:
            await self.call_all("ping")
            await asyncio.sleep(_HEALTH_CHECK_INTERVAL_S)

    async def sft_step(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """See `Trainer.sft_step`."""
        return (await self.call_all("sft_step", ray.put(trajectories)))[0]

    async def grpo_step(self, groups: Sequence[Group], weight_version: int | None = None) -> dict[str, float]:
        """See `Trainer.grpo_step`. Groups with frames that cannot be decoded again are dropped and counted.

        Unreadable groups are found before the step: a rank that failed in mid-step would leave the others
        waiting in a collective. The frames fetched for this check stay cached for the step.

        Raises:
            UserError: The share of dropped groups exceeds `config.max_unreadable_share`; nothing was updated.
            StepStopped: See `request_stop`.
        """
        unreadable: dict[int, str] = {}
        for errors in await self.call_all("find_unreadable", ray.put(groups)):
            unreadable |= errors
        for index, error in sorted(unreadable.items()):
            log.warning("Dropping the group of task %s: %s", groups[index].task_id, error)
        if len(unreadable) > self._config.max_unreadable_share * len(groups):
            raise UserError(
                f"frames of {len(unreadable)} of {len(groups)} groups cannot be decoded again, above "
                f"learner.max_unreadable_share ({self._config.max_unreadable_share:g}). The first error: "
                f"{unreadable[min(unreadable)]}"
            )
        readable = [group for index, group in enumerate(groups) if index not in unreadable]
        metrics = (await self.call_all("grpo_step", ray.put(readable), weight_version))[0]
        return {**metrics, "groups_unreadable": len(unreadable)}

    async def request_stop(self) -> None:
        """Ask the ranks to drop the GRPO step that they compute, and all later ones.

        Its call raises `StepStopped` before the next micro-batch; without a further one, it ends normally.

        Raises:
            ProcessEndedError: Rank 0 died.
            StepTimeout: The node of rank 0 did not answer within 30 s.
        """
        await self._processes[0].request_stop(actor_name(0))

    async def compute_logprobs(self, trajectories: Sequence[Trajectory]) -> list[NDArray[np.float32]]:
        """See `Trainer.compute_logprobs`."""
        return (await self.call_all("compute_logprobs", ray.put(trajectories)))[0]

    async def score_probe(self, probe: ParityProbe) -> ProbeScore:
        """See `Trainer.score_probe`."""
        return (await self.call_all("score_probe", probe))[0]

    async def save_checkpoint(self, directory: Path) -> None:
        """See `Trainer.save_checkpoint`; all ranks' nodes must share `directory`."""
        await self.call_all("save_checkpoint", directory)

    async def load_checkpoint(self, directory: Path) -> None:
        """See `Trainer.load_checkpoint`."""
        await self.call_all("load_checkpoint", directory)

    async def export_hf(self, directory: Path) -> None:
        """See `Trainer.export_hf`."""
        await self.call_all("export_hf", directory)

    async def load_states(self) -> None:
        """Move offloaded states of all ranks to their devices. States that are there stay."""
        await self.call_all("load_states")

    async def rendezvous_address(self) -> tuple[str, int]:
        """Return the IP address of rank 0's node and a free port."""
        return (await self.call_all("rendezvous_address"))[0]

    def close(self) -> None:
        """Kill the ranks and release their resources, unless rollout workers use them, too."""
        self._kill_ranks()
        if not self._placement.has_workers:
            self._placement.release()

    def _kill_ranks(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._processes = [], []

    async def call_all(self, method: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        """Call a method of `LearnerActor` on all ranks.

        Args:
            timeout_s: Default is `config.timeout_s`.

        Returns:
            The result of each rank.
        """
        if not self._actors:
            raise LearnerDiedError(f"the learner has no ranks for {method}: it is being restarted")
        timeout_s = timeout_s or self._config.timeout_s
        calls = [
            asyncio.ensure_future(self._await_rank(rank, method, getattr(actor, method).remote(*args), timeout_s))
            for rank, actor in enumerate(self._actors)
        ]
        try:
            await _wait_for_ranks(calls)
            if all(call.done() and not call.exception() for call in calls):
                return [call.result() for call in calls]
            raise _root_cause(method, calls)
        finally:
            for call in calls:
                call.cancel()

    async def _await_rank(self, rank: int, method: str, call: Awaitable[Any], timeout_s: float) -> Any:
        """Await a call; after a timeout, add the rank's current function to the error."""
        try:
            return await with_timeout(call, timeout_s, target=actor_name(rank), operation=method)
        except StepTimeout as error:
            if isinstance(error, RayTaskError):
                raise  # a timeout inside the rank
            state = await self._inspect(rank)
            raise StepTimeout(error.target, error.operation, error.timeout_s, state) from error

    async def _inspect(self, rank: int) -> str:
        """Return a late rank's current function and log its stacks."""
        name = actor_name(rank)
        try:
            if not self._processes:
                raise StackDumpError("it has not started")
            state, stacks = await self._processes[rank].report(name)
        except Exception as error:
            return f"the state of {name} is unknown: {error}"
        log.warning("Timeout of %s: it is %s\n%s", name, state, stacks)
        return f"{name} is {state}"


async def _wait_for_ranks(calls: Sequence[asyncio.Future[Any]]) -> None:
    """Wait until all ranks have answered, one has died, or the grace period after a failure has passed."""
    pending, deadline = set(calls), float("inf")
    while pending and (remaining_s := deadline - time.monotonic()) > 0:
        timeout_s = None if remaining_s == float("inf") else remaining_s
        done, pending = await asyncio.wait(pending, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if any(_died(call) for call in done):
            return
        # A rank that lost a peer fails immediately in its collective, before Ray reports the death.
        if deadline == float("inf") and any(call.exception() for call in done):
            deadline = time.monotonic() + _FAILURE_GRACE_S


def _died(call: asyncio.Future[Any]) -> bool:
    # Ray raises OutOfMemoryError after killing the process on a node without free memory.
    return isinstance(call.exception(), RayActorError | OutOfMemoryError)


def _root_cause(method: str, calls: Sequence[asyncio.Future[Any]]) -> Exception:
    """Return the error of a rank that died, or else of the first rank that failed."""
    errors = {rank: error for rank, call in enumerate(calls) if call.done() and (error := call.exception())}
    for rank, error in errors.items():
        if _died(calls[rank]):
            reason = str(error).strip().splitlines()[0]
            return LearnerDiedError(f"{actor_name(rank)} died during {method} ({reason})")
    first = next(iter(errors.values()))
    if isinstance(first, StepTimeout) and first.state:
        # Among ranks that wait for each other, the one with a different state is the cause.
        states = [error.state for error in errors.values() if isinstance(error, StepTimeout) and error.state]
        return StepTimeout(first.target, first.operation, first.timeout_s, "; ".join(states))
    if isinstance(first, RayTaskError) and isinstance(first.cause, Exception):
        return first.cause
    return first if isinstance(first, Exception) else RuntimeError(f"{method} failed: {first!r}")


def _environment(config: LearnerConfig, gpus: float) -> dict[str, str]:
    """Return environment variables that must be set before torch is imported."""
    # Spinning OpenMP threads slow down other processes on shared cores several times.
    variables = {} if gpus else {"OMP_WAIT_POLICY": "passive"}
    return variables | {"OMP_NUM_THREADS": str(config.num_threads)}
