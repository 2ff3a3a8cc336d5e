"""The fleet: plays groups on whichever workers there are, and replaces those that die.

    play_group --> reserve a ready worker with room, for the whole group
                   |-- each episode: play -> accept in the ledger
                   |       worker died, or was too slow: owed again, played where there is room
                   '-- all accepted or given up: the group

    publish    --> every ready worker pauses, receives, is checked, resumes;
                   one that fails is killed and replaced
    a worker that starts gets the present weights before its first token

    scale      --> episodes wait for places: more workers; workers idle: one of them drains
    notice     --> a worker whose node is about to go drains, and is replaced if it is needed

Consumes tasks, produces groups in the order in which they finish. One asyncio
loop owns all state; no pixels pass through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.rollout import RolloutConfig
from vz_ray.data.task import Task
from vz_ray.episode.trajectory import Context, EpisodeId, Group, Sampling, Status, Trajectory
from vz_ray.observe.deadline import Overdue, within
from vz_ray.observe.scaler import Scaler
from vz_ray.rollout.ledger import Ledger
from vz_ray.rollout.state import Event, WorkerState, after
from vz_ray.rollout.worker import WorkerStats
from vz_ray.weights.publisher import Publisher, PublishReport, Sender, Update
from vz_ray.weights.verify import Probe

log = logging.getLogger(__name__)

_ANSWER_S = 10.0
"""How long a worker that is late may take to say what it is doing."""
_SCALE_S = 0.5
"""How often the load is looked at."""


class WorkerLost(RuntimeError):
    """The worker is gone, or of no use: what it was doing must be done elsewhere."""


class FleetFailed(RuntimeError):
    """No worker can be had; says why the last ones could not."""


class RemoteWorker(Protocol):
    """A worker, wherever it runs. Every method may raise `WorkerLost`."""

    name: str

    async def start(self) -> None: ...

    async def play_episode(
        self, task: Task, id: EpisodeId, sampling: Sampling, episode: EpisodeConfig | None
    ) -> Trajectory: ...

    async def pause(self) -> None: ...

    async def init_weights(self, info: dict[str, Any]) -> None: ...

    async def receive(self, update: Update) -> None: ...

    async def thaw(self) -> None: ...

    async def score(self, probe: Probe) -> Sequence[float]: ...

    async def resume(self) -> None: ...

    async def check(self) -> None: ...

    def notice(self) -> str:
        """Why it will have to go before long, such as its node being reclaimed; empty if nothing is known."""
        ...

    async def stats(self) -> WorkerStats: ...

    async def whereabouts(self) -> tuple[str, str]:
        """What it is doing, in a few words, and the stacks of its threads and tasks."""
        ...

    async def end(self) -> None:
        """Ends it with everything it started, cleanly if it still answers."""
        ...


@dataclass(eq=False)
class _Seat:
    """A worker as the fleet sees it."""

    worker: RemoteWorker
    state: WorkerState = WorkerState.STARTING
    load: int = 0
    why: str = ""
    extra: bool = False
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Seat:
    """A worker, for people and metrics. `load` counts episodes that it plays or is to play."""

    name: str
    state: WorkerState
    load: int
    why: str


class _Pulse:
    """Wakes whoever waits for a change of the fleet; changes themselves never wait."""

    def __init__(self) -> None:
        self._beat = asyncio.Event()

    def beat(self) -> None:
        self._beat.set()
        self._beat = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._beat.wait()


@dataclass
class _Home:
    """Where a group is played; moves when its worker is lost, for all its samples at once."""

    seat: _Seat
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Fleet:
    """Rollout workers and the work that is spread over them.

    Args:
        spawn: Makes a worker of that name, not started yet.
        publisher: Brings weights to workers.
        starts: Consecutive failures to start after which the fleet gives up.
    """

    def __init__(
        self,
        spawn: Callable[[str], RemoteWorker],
        config: RolloutConfig,
        publisher: Publisher,
        *,
        starts: int = 3,
    ) -> None:
        self._spawn, self._config, self._publisher, self._starts = spawn, config, publisher, starts
        self._sender: Sender | None = None
        self._seats: list[_Seat] = []
        self._changed = _Pulse()
        self._turnstile = asyncio.Lock()
        self._weights = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._born = 0
        self._failures: list[str] = []
        self._closed = False
        self._admitting = True
        self._waiting = 0
        self._scaler = Scaler(
            least=config.workers,
            most=config.most_workers,
            each=config.episodes_per_worker,
            grow_s=config.grow_s,
            shrink_s=config.shrink_s,
        )

    # -- workers ----------------------------------------------------------------

    async def start(self) -> None:
        """Starts the workers; returns when the first is ready, the others come when they can.

        Where there may be none, it returns at once: workers come with the first episodes.

        Raises:
            FleetFailed, Overdue: None got ready; the fleet is closed.
        """
        for _ in range(self._config.workers):
            self._add()
        self._keep(self._watch())
        if self._config.most_workers > self._config.workers:
            self._keep(self._scale())
        if not self._config.workers:
            return
        ready = self._wait_for(lambda: any(s.state is WorkerState.READY for s in self._seats))
        try:
            await within(self._config.start_deadline_s, ready, who="fleet", what="starting its first worker")
        except BaseException:
            await self.close()
            raise

    @property
    def version(self) -> int:
        """Weight version that ready workers hold; 0 is what they were started with."""
        current = self._publisher.current
        return current.version if current is not None else 0

    @property
    def waiting(self) -> int:
        """Episodes of groups that have no worker yet."""
        return self._waiting

    def seats(self) -> list[Seat]:
        """All workers there ever were, in order of their start."""
        return [Seat(s.worker.name, s.state, s.load, s.why) for s in self._seats]

    async def stats(self) -> list[WorkerStats]:
        """Counts of the ready workers; one that does not answer is left out."""
        deadline = self._config.turn_deadline_s
        ready = [s.worker for s in self._seats if s.state is WorkerState.READY]
        asked = [within(deadline, w.stats(), who=w.name, what="its stats") for w in ready]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, WorkerStats)]

    async def close(self) -> None:
        """Ends all workers. Whoever waits for a group gets `FleetFailed`."""
        self._closed = True
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        for seat in self._seats:
            await self._lose(seat, "the fleet was closed")
            await self._end(seat)

    def _add(self) -> None:
        self._born += 1
        # The fleet does not depend on one that comes beside those it needs.
        extra = len(self._staying()) >= max(1, self._config.workers)
        seat = _Seat(self._spawn(f"rollout-{self._born - 1}"), extra=extra)
        self._seats.append(seat)
        self._keep(self._bring_up(seat))

    async def _bring_up(self, seat: _Seat) -> None:
        """Starts a worker and gives it the present weights."""
        worker, deadline = seat.worker, self._config.start_deadline_s
        try:
            await within(deadline, worker.start(), who=worker.name, what="starting")
            async with self._weights:
                if seat.state is WorkerState.DEAD:
                    return  # let go before it was there
                self._step(seat, Event.STARTED)
                if self._publisher.current is not None:
                    current = self._publisher.current
                    report = await self._publisher.deliver(current, [worker], sender=self._sender)
                    if report.failed:
                        raise WorkerLost(report.failed[worker.name])
                self._step(seat, Event.SYNCED)
            self._failures.clear()
        except Exception as error:
            if seat.state is not WorkerState.DEAD and not seat.extra:
                self._failures.append(f"{worker.name}: {type(error).__name__}: {error}")
            await self._lose(seat, str(error))

    def _step(self, seat: _Seat, event: Event) -> None:
        seat.state = after(seat.state, event)
        self._changed.beat()

    async def _lose(self, seat: _Seat, why: str) -> None:
        """Marks a worker dead, ends what is left of it, and starts another in its place."""
        if seat.state is WorkerState.DEAD:
            return
        seat.why = why
        self._step(seat, Event.DIED)
        if not self._closed:
            log.warning("%s is out of service: %s", seat.worker.name, why)
            if len(self._failures) < self._starts and len(self._staying()) < self._config.workers:
                self._add()
        await self._end(seat)

    def _staying(self) -> list[_Seat]:
        """Workers that play, or will."""
        gone = (WorkerState.DEAD, WorkerState.DRAINING)
        return [seat for seat in self._seats if seat.state not in gone]

    async def _scale(self) -> None:
        """Starts and lets go workers as the load asks."""
        while True:
            await asyncio.sleep(_SCALE_S)
            staying = self._staying()
            load = sum(seat.load for seat in staying) + self._waiting
            target = self._scaler.target(time.monotonic(), len(staying), load)
            for _ in range(target - len(staying)):
                self._add()
            # One that gets weights at this moment could not finish what it plays.
            spare = [seat for seat in staying if seat.state is not WorkerState.SYNCING]
            if target < len(staying) and spare:
                first = min(spare, key=lambda seat: (seat.state is WorkerState.READY, seat.load))
                self._drain(first, "fewer workers will do")

    def _drain(self, seat: _Seat, why: str) -> None:
        """Gives a worker no new episodes, and ends it when it has played those that it has."""
        log.info("%s is to go: %s", seat.worker.name, why)
        seat.why = why
        self._step(seat, Event.DRAIN)
        self._keep(self._let_go(seat))

    async def _let_go(self, seat: _Seat) -> None:
        # Its episodes have deadlines of their own, and leave it in any case.
        await self._changed.until(lambda: not seat.load or seat.state is WorkerState.DEAD)
        if seat.state is WorkerState.DRAINING:
            self._step(seat, Event.EMPTY)
        await self._end(seat)

    async def _end(self, seat: _Seat) -> None:
        if seat.ended:
            return
        try:
            await within(60, seat.worker.end(), who=seat.worker.name, what="ending")
        except Exception as error:
            log.warning("%s did not end cleanly: %s", seat.worker.name, error)
        seat.ended = True

    async def _watch(self) -> None:
        """Finds workers that died while nobody asked anything of them, and those that will have to go."""
        while True:
            await asyncio.sleep(self._config.health_every_s)
            for seat in [s for s in self._seats if s.state is WorkerState.READY]:
                if why := seat.worker.notice():
                    self._drain(seat, why)
                    if len(self._staying()) < self._config.workers:
                        self._add()
            ready = [s for s in self._seats if s.state is WorkerState.READY]
            await asyncio.gather(*(self._probe_health(seat) for seat in ready))

    async def _probe_health(self, seat: _Seat) -> None:
        worker = seat.worker
        try:
            await within(self._config.turn_deadline_s, worker.check(), who=worker.name, what="a health check")
        except Exception as error:
            await self._lose(seat, str(error))

    def _keep(self, work: Any) -> None:
        """Runs in the background; asyncio itself would not keep it alive."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # -- weights ----------------------------------------------------------------

    async def publish(self, version: int, sender: Sender, *, finish_first: bool = False) -> PublishReport:
        """Brings new weights to every ready worker; those that fail are replaced.

        Episodes in flight go on with the new weights; with `finish_first`, they end before, and
        groups that have not begun wait.

        Raises:
            ValueError: `version` is not newer than the last one.
            Overdue: The learner was not ready in time; workers play on.
            WeightsBroken: The weights could not be sent; every worker is replaced.
        """
        async with self._weights:
            began, self._sender = time.monotonic(), sender
            update = await self._publisher.prepare(version, sender)
            prepare_s = time.monotonic() - began
            async with self._standstill() if finish_first else contextlib.nullcontext():
                return await self._deliver(update, sender, prepare_s)

    @contextlib.asynccontextmanager
    async def _standstill(self) -> AsyncIterator[None]:
        """No group begins inside, and those that have begun have ended."""
        self._admitting = False
        try:
            still = self._wait_for(lambda: not any(seat.load for seat in self._seats))
            # Each episode has its own deadline, for each of its attempts.
            once_s = 2 * (self._config.episode_deadline_s + self._config.turn_deadline_s)
            most_s = self._config.attempts * once_s
            await within(most_s, still, who="fleet", what="the episodes in flight before an update")
            yield
        finally:
            self._admitting = True
            self._changed.beat()

    async def _deliver(self, update: Update, sender: Sender, prepare_s: float) -> PublishReport:
        seats = [s for s in self._seats if s.state is WorkerState.READY]
        for seat in seats:
            self._step(seat, Event.PUBLISH)
        workers = [s.worker for s in seats]
        try:
            report = await self._publisher.deliver(update, workers, sender=sender, prepare_s=prepare_s)
        except BaseException as error:
            for seat in seats:
                self._keep(self._lose(seat, str(error)))
            raise
        for seat in seats:
            if (why := report.failed.get(seat.worker.name)) is not None:
                self._keep(self._lose(seat, why))
            elif seat.state is WorkerState.SYNCING:
                self._step(seat, Event.SYNCED)
        return report

    # -- play -------------------------------------------------------------------

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
        self._waiting += len(ids)
        try:
            async with self._turnstile:
                home = _Home(await self._reserve(len(ids), begins=True))
        finally:
            self._waiting -= len(ids)
        plays = [asyncio.create_task(self._play_one(task, id, sampling, ledger, home, episode)) for id in ids]
        # Lets each of them begin, as each gives its reserved place back when it ends.
        await asyncio.sleep(0)
        try:
            kept = await _first(plays, len(ids) if keep is None else keep)
        finally:
            await _cancel(plays)
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
        seat = home.seat
        while True:
            try:
                trajectory = await self._attempt(seat, task, id, sampling, episode)
            except (WorkerLost, Overdue) as error:
                why = str(error)
            else:
                ledger.accept(trajectory.id)
                return trajectory
            finally:
                seat.load -= 1
                self._changed.beat()
            if id.attempt + 1 >= self._config.attempts:
                ledger.drop(id.owed, why)
                return Trajectory(id, "", Context((), ()), (), Status.FAILED, error=why)
            id = ledger.retry(id.owed)
            seat = await self._rehome(home)

    async def _attempt(
        self, seat: _Seat, task: Task, id: EpisodeId, sampling: Sampling, episode: EpisodeConfig | None
    ) -> Trajectory:
        worker = seat.worker
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
            await self._lose(seat, str(error))
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

    async def _reserve(self, places: int, *, begins: bool = False) -> _Seat:
        """The ready worker with the least to do, once one has a free place; `places` on it are taken.

        A group goes to one worker as soon as that has any place: samples beyond its places wait
        there for the next ones to end, so that no place stays empty until a whole group fits. One
        that `begins` waits while the fleet admits none.
        """
        cap = self._config.episodes_per_worker

        def free() -> list[_Seat]:
            return [s for s in self._seats if s.state is WorkerState.READY and s.load < cap]

        await self._wait_for(lambda: (self._admitting or not begins) and bool(free()))
        seat = min(free(), key=lambda s: s.load)
        seat.load += places
        return seat

    async def _rehome(self, home: _Home) -> _Seat:
        """A place for a sample that is played again: at its group's home, or at a new one."""
        async with home.lock:
            if home.seat.state in (WorkerState.READY, WorkerState.SYNCING):
                home.seat.load += 1
            else:
                home.seat = await self._reserve(1)
            return home.seat

    async def _wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits until `condition` holds; a fleet that cannot start workers raises instead."""

        def over() -> bool:
            return condition() or self._closed or self._hopeless()

        await self._changed.until(over)
        if self._closed:
            raise FleetFailed("the fleet was closed")
        if not condition():
            raise FleetFailed(
                f"no rollout worker can be started: {'; '.join(self._failures[-self._starts :])}"
            )

    def _hopeless(self) -> bool:
        alive = any(s.state is not WorkerState.DEAD for s in self._seats)
        return not alive and len(self._failures) >= self._starts


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
