"""The learner as the driver sees it: Ray actors, one per rank; everything it does is `Trainer`'s.

driver: LearnerGroup --- trajectories, without pixels ---> LearnerRank 0 .. n-1
before an RL step: groups whose frames cannot be got again are left out, on all ranks alike
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
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vz_ray.config.learner import LearnerConfig
from vz_ray.env.protocols import FrameSource
from vz_ray.env.trajectory import Group, Trajectory
from vz_ray.learner.hang_report import HangReporter, actor_name
from vz_ray.learner.learner_actor import LearnerActor
from vz_ray.monitoring.log_context import RunIdentity
from vz_ray.utils.code_fingerprint import code_fingerprint
from vz_ray.utils.errors import UserError
from vz_ray.utils.placement import node_group_resources
from vz_ray.utils.stack_dump import StackDumpError
from vz_ray.utils.timeouts import StepTimeout, with_timeout
from vz_ray.weight_sync.parity_probe import ParityProbe

T = TypeVar("T")

log = logging.getLogger(__name__)

_GRACE_S = 90.0
"""When one rank fails, how long the others have to show that it was they who failed first: Ray gives up
a node that fell silent after five checks of at most 10 s each, 3 s apart."""
_LOOK_S = 2.0
"""How often ranks are looked at that nobody asks anything of."""
_POLL_S = 1.0


class LearnerDiedError(RuntimeError):
    """A rank died: the others cannot go on, and the learner must be started again."""


class Learner:
    """All ranks of the learner, as the driver sees them.

    A rank whose process dies is noticed at once in a call, and within 2 s between calls by whoever
    `run_with_health_check`es; one whose node falls silent, when Ray gives that up: about a minute by Ray's own settings.

    Args:
        frames: A handle that can be sent to actors, such as the clip pool's.
        badge: Which run the ranks log for, and how.
        logs: Directory for `learner-rank-<n>.log`, on each rank's node; empty leaves what they print to Ray.

    Attributes:
        start_count: How often it has been started.

    Raises (every call):
        LearnerLost: A rank died; the message names it and the call. `restart`, then load a checkpoint.
        Overdue: A rank did not finish within `config.deadline_s`; says what each late one is doing.
    """

    def __init__(
        self,
        config: LearnerConfig,
        frame_source: FrameSource,
        *,
        cpus_per_rank: float = 1.0,
        gpus_per_rank: float = 0.0,
        badge: RunIdentity = RunIdentity(),  # noqa: B008 - frozen
        log_dir: str = "",
    ) -> None:
        self._config, self._frames = config, frame_source
        self._badge, self._logs = badge, log_dir
        self._cpus, self._gpus = cpus_per_rank, gpus_per_rank
        self._ranks: list[Any] = []
        self._placement_group: PlacementGroup | None = None
        self._hang_reporters: list[HangReporter] = []
        self.start_count = 0

    @classmethod
    async def start(
        cls,
        config: LearnerConfig,
        frame_source: FrameSource,
        *,
        cpus_per_rank: float = 1.0,
        gpus_per_rank: float = 0.0,
        badge: RunIdentity = RunIdentity(),  # noqa: B008 - frozen
        log_dir: str = "",
    ) -> Learner:
        """A learner that has been started; see `restart`."""
        group = cls(
            config,
            frame_source,
            cpus_per_rank=cpus_per_rank,
            gpus_per_rank=gpus_per_rank,
            badge=badge,
            log_dir=log_dir,
        )
        await group.restart()
        return group

    async def restart(self) -> None:
        """Ends the ranks there are, places new ones, close to each other, and loads `config.model` on them.

        Senders of this group go on with the new ranks. What the old ones had learned is in their
        checkpoints alone.

        Raises:
            Overdue: Ray could not place them within `config.deadline_s`; says what was asked for.
            UserError: A node has another version of the code than this process. See also `Trainer`.
        """
        self.close()
        self.start_count += 1
        try:
            self._placement_group = await self._reserve()
            self._ranks = [
                self._spawn(self._placement_group, rank) for rank in range(self._config.world_size)
            ]
            self._hang_reporters = await self.call_all("admit", code_fingerprint())
            address, port = (await self.call_all("address"))[0]
            await self.call_all("start", self._config, self._frames, address, port)
        except BaseException:
            self.close()
            raise

    async def _reserve(self) -> PlacementGroup:
        """Room for all ranks."""
        config = self._config
        bundle = {"CPU": self._cpus} | ({"GPU": self._gpus} if self._gpus else {})
        group = node_group_resources(config.node_group)
        place = placement_group([bundle | group] * config.world_size, strategy="PACK")

        async def placed() -> None:
            # In short waits, as a thread that waits for all of the deadline would outlive a stop.
            while not await asyncio.to_thread(place.wait, _POLL_S):
                continue

        what = f"placing {config.world_size} learner ranks of {bundle}"
        try:
            await with_timeout(placed(), config.timeout_s, target="Ray", operation=what)
        except BaseException as error:
            remove_placement_group(place)
            if isinstance(error, StepTimeout):
                free = {name: n for name, n in ray.available_resources().items() if name in bundle}
                raise StepTimeout("Ray", what, config.timeout_s, f"the cluster has {free} free") from error
            raise
        return place

    def _spawn(self, place: PlacementGroup, rank: int) -> Any:
        options = LearnerActor.options(  # type: ignore[attr-defined]
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            resources=node_group_resources(self._config.node_group),
            scheduling_strategy=PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=rank),
            runtime_env={"env_vars": _environment(self._config, self._gpus)},
        )
        return options.remote(rank, self._badge, self._logs)

    async def run_with_health_check(self, work: Coroutine[Any, Any, T]) -> T:
        """Awaits `work`, which others do; ends it with `LearnerDiedError` as soon as a rank is found dead."""
        working, looking = asyncio.create_task(work), asyncio.create_task(self._check_health())
        try:
            await asyncio.wait({working, looking}, return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else looking.result()
        finally:
            working.cancel()
            looking.cancel()
            await asyncio.gather(working, looking, return_exceptions=True)

    async def _check_health(self) -> Never:
        while True:
            await self.call_all("check")
            await asyncio.sleep(_LOOK_S)

    async def sft_step(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """See `Trainer.sft_step`."""
        metrics: dict[str, float] = (await self.call_all("sft_step", ray.put(trajectories)))[0]
        return metrics

    async def grpo_step(self, groups: Sequence[Group], version: int | None = None) -> dict[str, float]:
        """See `Trainer.grpo_step`. Groups with a frame that cannot be got again are left out and counted.

        A rank that found out in the middle of a step would leave the others
        waiting for it, so they are found before: what is fetched then is kept
        for the step.

        Raises:
            UserError: More than `config.max_unreadable` of the groups are such; nothing was updated.
        """
        found: dict[int, str] = {}
        for part in await self.call_all("find_unreadable", ray.put(groups)):
            found |= part
        for index, why in sorted(found.items()):
            log.warning("task %s is not learned from: %s", groups[index].task_id, why)
        if len(found) > self._config.max_unreadable_share * len(groups):
            raise UserError(
                f"frames of {len(found)} of {len(groups)} groups cannot be got again, more than "
                f"learner.max_unreadable_share ({self._config.max_unreadable_share:g}); the first: {found[min(found)]}"
            )
        readable = [group for index, group in enumerate(groups) if index not in found]
        metrics: dict[str, float] = (await self.call_all("grpo_step", ray.put(readable), version))[0]
        return {**metrics, "groups_unreadable": len(found)}

    async def compute_logprobs(self, trajectories: Sequence[Trajectory]) -> list[NDArray[np.float32]]:
        """See `Trainer.compute_logprobs`."""
        found: list[NDArray[np.float32]] = (await self.call_all("compute_logprobs", ray.put(trajectories)))[0]
        return found

    async def score_probe(self, probe: ParityProbe) -> tuple[float, ...]:
        """See `Trainer.score_probe`."""
        found: tuple[float, ...] = (await self.call_all("score_probe", probe))[0]
        return found

    async def save_checkpoint(self, directory: Path) -> None:
        """See `Trainer.save_checkpoint`; `directory` must be shared by the ranks' nodes."""
        await self.call_all("save_checkpoint", directory)

    async def load_checkpoint(self, directory: Path) -> None:
        """See `Trainer.load_checkpoint`."""
        await self.call_all("load_checkpoint", directory)

    async def export_hf(self, directory: Path) -> None:
        """See `Trainer.export_hf`."""
        await self.call_all("export_hf", directory)

    async def address(self) -> tuple[str, int]:
        """Rank 0's node, and a port that is free on it."""
        where: tuple[str, int] = (await self.call_all("address"))[0]
        return where

    def close(self) -> None:
        """Kills the ranks and gives their place back."""
        for rank in self._ranks:
            ray.kill(rank)
        if self._placement_group is not None:
            remove_placement_group(self._placement_group)
        self._ranks, self._placement_group, self._hang_reporters = [], None, []

    async def call_all(self, method: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        """Calls a method on all ranks; returns their answers, or raises for the rank at fault."""
        if not self._ranks:
            raise LearnerDiedError(f"the learner has no ranks to do {method}: it is being started again")
        most_s = timeout_s or self._config.timeout_s
        calls = [
            asyncio.ensure_future(self._answer(index, method, getattr(rank, method).remote(*args), most_s))
            for index, rank in enumerate(self._ranks)
        ]
        try:
            await _settled(calls)
            if all(call.done() and not call.exception() for call in calls):
                return [call.result() for call in calls]
            raise _fault(method, calls)
        finally:
            for call in calls:
                call.cancel()

    async def _answer(self, index: int, method: str, call: Awaitable[Any], most_s: float) -> Any:
        """What a rank answers; one that is late is looked into."""
        try:
            return await with_timeout(call, most_s, target=actor_name(index), operation=method)
        except StepTimeout as late:
            if isinstance(late, RayTaskError):
                raise  # the rank itself waited for somebody else
            raise StepTimeout(
                late.target, late.operation, late.timeout_s, await self._look_into(index)
            ) from late

    async def _look_into(self, index: int) -> str:
        """What a rank that was waited for too long is doing; its stacks go to the log."""
        who = actor_name(index)
        try:
            if not self._hang_reporters:
                raise StackDumpError("it has not started")
            state, stacks = await self._hang_reporters[index].report(who)
        except Exception as error:
            return f"{who} does not say what it is doing: {error}"
        log.warning("%s was waited for too long: it is %s\n%s", who, state, stacks)
        return f"{who} is {state}"


async def _settled(calls: Sequence[asyncio.Future[Any]]) -> None:
    """Returns when all ranks have answered, or one has died, or one failed and the others' grace is over."""
    pending, until = set(calls), float("inf")
    while pending and (left := until - time.monotonic()) > 0:
        wait_s = None if left == float("inf") else left
        done, pending = await asyncio.wait(pending, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        if any(_died(call) for call in done):
            return
        # A rank that lost a peer fails at once in its collective; give the death time to be noticed.
        if until == float("inf") and any(call.exception() for call in done):
            until = time.monotonic() + _GRACE_S


def _died(call: asyncio.Future[Any]) -> bool:
    # Ray raises the latter where it ended the process itself, as the node ran out of memory.
    return isinstance(call.exception(), RayActorError | OutOfMemoryError)


def _fault(method: str, calls: Sequence[asyncio.Future[Any]]) -> Exception:
    """The error of the rank at fault: one that died, or else the first that failed."""
    faults = {i: error for i, call in enumerate(calls) if call.done() and (error := call.exception())}
    for index, error in faults.items():
        if _died(calls[index]):
            reason = str(error).strip().splitlines()[0]
            return LearnerDiedError(f"{actor_name(index)} died during {method} ({reason})")
    first = next(iter(faults.values()))
    if isinstance(first, StepTimeout) and first.state:
        # Of ranks that wait for each other, the one that is elsewhere than the rest is at fault.
        states = [error.state for error in faults.values() if isinstance(error, StepTimeout) and error.state]
        return StepTimeout(first.target, first.operation, first.timeout_s, "; ".join(states))
    if isinstance(first, RayTaskError) and isinstance(first.cause, Exception):
        return first.cause
    return first if isinstance(first, Exception) else RuntimeError(f"{method} failed: {first!r}")


def _environment(config: LearnerConfig, gpus: float) -> dict[str, str]:
    """What must be set before torch is imported."""
    # Spinning OpenMP threads starve whoever shares the cores: several times slower when they are busy.
    variables = {} if gpus else {"OMP_WAIT_POLICY": "passive"}
    if config.num_threads:
        variables["OMP_NUM_THREADS"] = str(config.num_threads)
    return variables
