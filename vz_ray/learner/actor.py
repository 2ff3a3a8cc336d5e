"""The learner as the driver sees it: Ray actors, one per rank; everything it does is `Trainer`'s.

driver: LearnerGroup --- trajectories, without pixels ---> LearnerRank 0 .. n-1
before an RL step: groups whose frames cannot be got again are left out, on all ranks alike
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vz_ray.config.learner import LearnerConfig
from vz_ray.episode.protocols import FrameSource
from vz_ray.episode.trajectory import Group, Trajectory
from vz_ray.learner.rank import LearnerRank
from vz_ray.observe.deadline import Overdue, within
from vz_ray.observe.errors import UserError
from vz_ray.weights.nccl import Roster
from vz_ray.weights.publisher import Receiver, Update
from vz_ray.weights.verify import Probe

log = logging.getLogger(__name__)

_GRACE_S = 5.0
"""When one rank fails, how long the others have to show that it was they who failed first."""


class LearnerLost(RuntimeError):
    """A rank died: the others cannot go on, and the learner must be started again."""


class LearnerGroup:
    """All ranks of the learner, as the driver sees them.

    Raises (every call):
        LearnerLost: A rank died; the message names it and the call.
        Overdue: A rank did not finish within `config.deadline_s`.
    """

    def __init__(self, config: LearnerConfig, ranks: Sequence[Any], place: PlacementGroup) -> None:
        self._config, self._ranks, self._place = config, list(ranks), place

    @classmethod
    async def start(
        cls,
        config: LearnerConfig,
        frames: FrameSource,
        *,
        cpus_per_rank: float = 1.0,
        gpus_per_rank: float = 0.0,
    ) -> LearnerGroup:
        """Places the ranks, close to each other, and loads the model on them.

        Args:
            frames: A handle that can be sent to actors, such as the clip pool's.

        Raises:
            Overdue: Ray could not place them in time; the message says what was asked for.
            UserError: See `Trainer`.
        """
        bundle = {"CPU": cpus_per_rank} | ({"GPU": gpus_per_rank} if gpus_per_rank else {})
        place = placement_group([bundle] * config.ranks, strategy="PACK")
        if not await asyncio.to_thread(place.wait, config.deadline_s):
            remove_placement_group(place)
            raise Overdue("Ray", f"placing {config.ranks} learner ranks of {bundle}", config.deadline_s)
        ranks = []
        for rank in range(config.ranks):
            where = PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=rank)
            options = LearnerRank.options(  # type: ignore[attr-defined]
                num_cpus=cpus_per_rank,
                num_gpus=gpus_per_rank,
                scheduling_strategy=where,
                runtime_env={"env_vars": _environment(config, gpus_per_rank)},
            )
            ranks.append(options.remote(config, rank, frames))
        group = cls(config, ranks, place)
        try:
            address, port = (await group._all("address"))[0]
            await group._all("start", address, port)
        except BaseException:
            group.close()
            raise
        return group

    async def sft_step(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """See `Trainer.sft_step`."""
        metrics: dict[str, float] = (await self._all("sft_step", ray.put(trajectories)))[0]
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
        for part in await self._all("unreadable", ray.put(groups)):
            found |= part
        for index, why in sorted(found.items()):
            log.warning("task %s is not learned from: %s", groups[index].task, why)
        if len(found) > self._config.max_unreadable * len(groups):
            raise UserError(
                f"frames of {len(found)} of {len(groups)} groups cannot be got again, more than "
                f"learner.max_unreadable ({self._config.max_unreadable:g}); the first: {found[min(found)]}"
            )
        readable = [group for index, group in enumerate(groups) if index not in found]
        metrics: dict[str, float] = (await self._all("grpo_step", ray.put(readable), version))[0]
        return {**metrics, "groups_unreadable": len(found)}

    async def logprobs(self, trajectories: Sequence[Trajectory]) -> list[NDArray[np.float32]]:
        """See `Trainer.logprobs`."""
        found: list[NDArray[np.float32]] = (await self._all("logprobs", ray.put(trajectories)))[0]
        return found

    async def score(self, probe: Probe) -> tuple[float, ...]:
        """See `Trainer.score`."""
        found: tuple[float, ...] = (await self._all("score", probe))[0]
        return found

    async def save_checkpoint(self, directory: Path) -> None:
        """See `Trainer.save_checkpoint`; `directory` must be shared by the ranks' nodes."""
        await self._all("save_checkpoint", directory)

    async def load_checkpoint(self, directory: Path) -> None:
        """See `Trainer.load_checkpoint`."""
        await self._all("load_checkpoint", directory)

    async def export_hf(self, directory: Path) -> None:
        """See `Trainer.export_hf`."""
        await self._all("export_hf", directory)

    def sender(self, root: Path, bucket_bytes: int, probe: Probe | None = None) -> LearnerSender:
        """What a `Publisher` sends from: versions in shared memory of rank 0's node, under `root`."""
        return LearnerSender(self, root, bucket_bytes, probe)

    def nccl_sender(self, tensor_parallel: int, probe: Probe | None = None) -> LearnerNcclSender:
        """What a `Publisher` sends from by NCCL: rank 0's GPU to those of all engines."""
        return LearnerNcclSender(self, tensor_parallel, probe)

    async def address(self) -> tuple[str, int]:
        """Rank 0's node, and a port that is free on it."""
        where: tuple[str, int] = (await self._all("address"))[0]
        return where

    def close(self) -> None:
        """Kills the ranks and gives their place back."""
        for rank in self._ranks:
            ray.kill(rank)
        remove_placement_group(self._place)

    async def _all(self, method: str, *args: Any) -> list[Any]:
        """Calls a method on all ranks; returns their answers, or raises for the rank at fault."""
        calls = [
            asyncio.ensure_future(
                within(
                    self._config.deadline_s,
                    getattr(rank, method).remote(*args),
                    who=_name(index),
                    what=method,
                )
            )
            for index, rank in enumerate(self._ranks)
        ]
        done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
        if any(call.exception() for call in done):
            # A rank that lost a peer fails at once in its collective; give the death time to be noticed.
            await asyncio.wait(calls, timeout=_GRACE_S)
            raise self._fault(method, calls)
        return [call.result() for call in calls]

    def _fault(self, method: str, calls: Sequence[asyncio.Future[Any]]) -> Exception:
        faults: dict[int, BaseException] = {}
        for index, call in enumerate(calls):
            if not call.done():
                call.cancel()
            elif (error := call.exception()) is not None:
                faults[index] = error
        for index, error in faults.items():
            if isinstance(error, ActorDiedError | ActorUnavailableError):
                reason = str(error).strip().splitlines()[0]
                return LearnerLost(
                    f"{_name(index)} died during {method} ({reason}); "
                    "start the learner again and load its last checkpoint"
                )
        first = next(iter(faults.values()))
        if isinstance(first, RayTaskError) and isinstance(first.cause, Exception):
            return first.cause
        return first if isinstance(first, Exception) else RuntimeError(f"{method} failed: {first!r}")


class LearnerSender:
    """The learner's side of a publish through shared memory; see `weights.publisher.Sender`."""

    def __init__(self, group: LearnerGroup, root: Path, bucket_bytes: int, probe: Probe | None) -> None:
        self._group, self._root, self._bucket_bytes, self._probe = group, root, bucket_bytes, probe

    async def prepare(self, version: int) -> Update:
        """Writes the present weights as `version`, and scores the probe with them."""
        answers = await self._group._all(
            "write_weights", version, self._root, self._bucket_bytes, self._probe
        )
        update: Update = answers[0]
        return update

    async def connect(self, workers: Sequence[Receiver]) -> None:
        """No group: workers read what `prepare` wrote."""

    async def send(self, update: Update) -> None:
        """Nothing to push."""


class LearnerNcclSender:
    """The learner's side of a publish by NCCL; see `weights.publisher.Sender`.

    The group's roster is fixed, so it is opened anew whenever the workers are
    not the ones of the last publish. A worker that joins between publishes is
    sent the version that was announced last, if the learner still holds it.
    """

    def __init__(self, group: LearnerGroup, tensor_parallel: int, probe: Probe | None) -> None:
        self._group, self._tensor_parallel, self._probe = group, tensor_parallel, probe
        self._joined: tuple[str, ...] = ()

    async def prepare(self, version: int) -> Update:
        """Announces the present weights as `version`, and scores the probe with them."""
        update: Update = (await self._group._all("announce_weights", version, self._probe))[0]
        return update

    async def connect(self, workers: Sequence[Receiver]) -> None:
        """Opens a group of rank 0 and these workers, unless they are the ones that it has."""
        names = tuple(worker.name for worker in workers)
        if names == self._joined or not workers:
            return
        self._joined = ()
        address, port = await self._group.address()
        roster = Roster(address, port, len(workers), self._tensor_parallel)
        await asyncio.gather(
            self._group._all("join_engines", roster),
            *(worker.init_weights(roster.init_info(index)) for index, worker in enumerate(workers)),
        )
        self._joined = names

    async def send(self, update: Update) -> None:
        """Broadcasts what was announced."""
        try:
            await self._group._all("send_weights", update.version)
        except BaseException:
            self._joined = ()  # a broadcast that broke off leaves the group unusable
            raise


def _environment(config: LearnerConfig, gpus: float) -> dict[str, str]:
    """What must be set before torch is imported."""
    # Spinning OpenMP threads starve whoever shares the cores: several times slower when they are busy.
    variables = {} if gpus else {"OMP_WAIT_POLICY": "passive"}
    if config.threads:
        variables["OMP_NUM_THREADS"] = str(config.threads)
    return variables


def _name(rank: int) -> str:
    return f"learner-rank-{rank}"
