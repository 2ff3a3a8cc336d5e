"""The fleet: plays groups on whichever workers there are.

    play_group --> reserve a ready worker with a free place, for the whole group
                   |-- each episode: play -> accept in the ledger
                   |       worker died, or was too slow: owed again, played where there is room
                   '-- all accepted or given up: the group

Consumes tasks, produces groups in the order in which they finish. The workers
themselves, and the weights that they hold, are the crew's. One asyncio loop
owns all state; no pixels pass through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.rollout import RolloutConfig
from vz_ray.data.task import Task
from vz_ray.episode.trajectory import Context, EpisodeId, Group, Sampling, Status, Trajectory
from vz_ray.observe.deadline import Overdue, within
from vz_ray.observe.records import about
from vz_ray.rollout.admission import Admission
from vz_ray.rollout.crew import Crew
from vz_ray.rollout.ledger import Ledger
from vz_ray.rollout.member import Member, RemoteWorker, Seat, WorkerLost
from vz_ray.rollout.state import WorkerState
from vz_ray.rollout.worker import WorkerStats
from vz_ray.weights.publisher import Publisher, PublishReport, Sender

log = logging.getLogger(__name__)

_ANSWER_S = 10.0
"""How long a worker that is late may take to say what it is doing."""


@dataclass
class _Home:
    """Where a group is played; moves when its worker is lost, for all its samples at once."""

    member: Member
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Fleet:
    """Rollout workers and the work that is spread over them.

    Args:
        spawn: Makes a worker of that name, not started yet.
        config: How many workers, their places, deadlines and attempts.
        publisher: Brings weights to workers.
        starts: Consecutive failures to start after which the fleet gives up.

    Attributes:
        accepted: Called with each episode as it is accepted; must not raise or take long.
    """

    def __init__(
        self,
        spawn: Callable[[str], RemoteWorker],
        config: RolloutConfig,
        publisher: Publisher,
        *,
        starts: int = 3,
    ) -> None:
        self._crew, self._config = Crew(spawn, config, publisher, starts), config
        self._turnstile, self._admission = asyncio.Lock(), Admission()
        self.accepted: Callable[[Trajectory], None] = lambda _: None

    async def start(self) -> None:
        """See `Crew.start`."""
        await self._crew.start()

    async def close(self) -> None:
        """Ends all workers. Whoever waits for a group gets `FleetFailed`."""
        await self._crew.close()

    async def publish(self, version: int, sender: Sender, *, finish_first: bool = False) -> PublishReport:
        """See `Crew.publish`."""
        return await self._crew.publish(version, sender, finish_first=finish_first)

    async def stats(self) -> list[WorkerStats]:
        """Counts of the ready workers; one that does not answer is left out."""
        return await self._crew.stats()

    @property
    def version(self) -> int:
        """Weight version that ready workers hold; 0 is what they were started with."""
        return self._crew.version

    @property
    def waiting(self) -> int:
        """Episodes of groups that have no worker yet."""
        return self._crew.waiting

    @property
    def lost(self) -> int:
        """Workers that died, or never came."""
        return self._crew.lost

    @property
    def size(self) -> int:
        """Workers that serve now."""
        serving = (WorkerState.READY, WorkerState.SYNCING)
        return sum(seat.state in serving for seat in self.seats())

    def seats(self) -> list[Seat]:
        """All workers there ever were, in order of their start."""
        return self._crew.seats()

    async def play(
        self, tasks: Iterable[Task], samples: int, sampling: Sampling, ledger: Ledger, *, iteration: int = 0
    ) -> AsyncIterator[Group]:
        """Plays `samples` episodes of each task; yields groups as they finish.

        Closing the iterator gives up what has not finished: it stays owed in `ledger`.
        """
        pending = {
            asyncio.create_task(self.play_group(task, samples, sampling, ledger, iteration=iteration))
            for task in tasks
        }
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for group in done:
                    yield group.result()
        finally:
            await _cancel(pending)

    async def play_group(
        self,
        task: Task,
        samples: int,
        sampling: Sampling,
        ledger: Ledger,
        *,
        iteration: int = 0,
        episode: EpisodeConfig | None = None,
        spare: int = 0,
    ) -> Group:
        """Plays all samples of a task on one worker, as long as it lives.

        `episode` takes the place of the workers' own rules, for an evaluation of another kind.
        With `spare`, so many further samples are played, the first `samples` that end are the group
        and the others are given up: no group waits for its longest episodes, and long ones are
        in groups less often than they are played.

        A sample that was tried too often becomes a FAILED trajectory that says
        why, and is dropped in `ledger`. Waits for a worker with room first, in
        the order of the calls.

        Raises:
            FleetFailed: No worker can be had.
        """
        ids = ledger.owe(iteration, task.task_id, samples + spare)
        return await self.play_owed(task, ids, sampling, ledger, episode, keep=samples)

    async def play_owed(
        self,
        task: Task,
        ids: Sequence[EpisodeId],
        sampling: Sampling,
        ledger: Ledger,
        episode: EpisodeConfig | None = None,
        *,
        keep: int | None = None,
    ) -> Group:
        """As `play_group`, for samples that `ledger` already knows to be owed; the first `keep` are kept."""
        self._crew.waiting += len(ids)
        try:
            async with self._turnstile:
                home = _Home(await self._reserve(len(ids), begins=True))
        finally:
            self._crew.waiting -= len(ids)
        self._crew.begun += 1
        plays = [asyncio.create_task(self._play_one(task, id, sampling, ledger, home, episode)) for id in ids]
        try:
            # Lets each of them begin, as each gives its reserved place back when it ends.
            await asyncio.sleep(0)
            kept = await _first(plays, len(ids) if keep is None else keep)
        finally:
            await _cancel(plays)
            self._crew.begun -= 1
            self._crew.changed.beat()
        for id in ids:
            if id.owed in ledger.attempts:
                ledger.drop(id.owed, "a spare sample, not needed")
        return Group(task.task_id, kept)

    async def _play_one(
        self,
        task: Task,
        id: EpisodeId,
        sampling: Sampling,
        ledger: Ledger,
        home: _Home,
        episode: EpisodeConfig | None,
    ) -> Trajectory:
        """Plays one owed sample until it is accepted or given up. Its place at home is reserved."""
        member = home.member
        while True:
            try:
                with about(iteration=id.iteration, episode=str(id), worker=member.worker.name):
                    trajectory = await self._attempt(member, task, id, sampling, episode)
            except (WorkerLost, Overdue) as error:
                why = str(error)
            else:
                ledger.accept(trajectory.id)
                self._admission.ended(trajectory.length)
                self.accepted(trajectory)
                return trajectory
            finally:
                member.load -= 1
                self._crew.changed.beat()
            if id.attempt + 1 >= self._config.attempts:
                ledger.drop(id.owed, why)
                return Trajectory(id, "", Context(()), (), Status.FAILED, error=why)
            id = ledger.retry(id.owed)
            member = await self._rehome(home)

    async def _attempt(
        self, member: Member, task: Task, id: EpisodeId, sampling: Sampling, episode: EpisodeConfig | None
    ) -> Trajectory:
        worker = member.worker
        # The worker has the same deadline, and names the cause; this one is for a worker that hangs.
        # Before its place there is free, another episode may have to end.
        deadline = 2 * self._config.episode_deadline_s + 2 * self._config.turn_deadline_s
        try:
            return await within(
                deadline,
                worker.play_episode(task, id, sampling, episode),
                who=worker.name,
                what=f"episode {id}",
            )
        except WorkerLost as error:
            await self._crew.lose(member, str(error))
            raise
        except Overdue as overdue:
            if overdue.state:
                raise
            raise Overdue(
                overdue.who, overdue.what, overdue.seconds, await self._look_into(worker)
            ) from overdue

    async def _look_into(self, worker: RemoteWorker) -> str:
        """What a worker that was waited for too long is doing; its stacks go to the log."""
        try:
            state, where = await within(
                _ANSWER_S, worker.whereabouts(), who=worker.name, what="its whereabouts"
            )
        except Exception as error:
            return f"and does not say what it is doing: {type(error).__name__}"
        log.warning("%s was waited for too long: %s\n%s", worker.name, state, where)
        return state

    async def _reserve(self, places: int, *, begins: bool = False) -> Member:
        """The ready worker with the most room, once one has a free place; `places` on it are taken.

        A group goes to one worker as soon as that has any place: samples beyond its places wait
        there for the next ones to end, so that no place stays empty until a whole group fits. One
        that `begins` waits while the fleet admits none.
        """
        cap = self._config.episodes_per_worker

        def free() -> list[Member]:
            return [s for s in self._crew.members if s.state is WorkerState.READY and s.load < cap]

        await self._crew.wait_for(lambda: (self._crew.admitting or not begins) and bool(free()))
        member = self._admission.choose(free())
        member.load += places
        return member

    async def _rehome(self, home: _Home) -> Member:
        """A place for a sample that is played again: at its group's home, or at a new one."""
        async with home.lock:
            if home.member.state in (WorkerState.READY, WorkerState.SYNCING):
                home.member.load += 1
            else:
                home.member = await self._reserve(1)
            return home.member


async def _first(plays: Sequence[asyncio.Task[Trajectory]], keep: int) -> tuple[Trajectory, ...]:
    """The first `keep` that did not fail, or failed ones where there are not as many; in order of sample."""
    pending, ended = set(plays), list[Trajectory]()
    while pending and sum(t.status is not Status.FAILED for t in ended) < keep:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        ended += [play.result() for play in done]
    ended.sort(key=lambda t: t.status is Status.FAILED)
    return tuple(sorted(ended[:keep], key=lambda t: t.id.sample))


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels what is not done, and waits until it has ended."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)
