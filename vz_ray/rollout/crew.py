"""The crew: which workers there are, from their start to their end, and the weights that they hold.

    start, scale --> a worker starts, and gets the present weights before its first token
    publish      --> every ready worker pauses, receives, is checked, resumes;
                     one that fails is killed and replaced
    watch        --> one that died is replaced; one whose node is about to go drains
    scale        --> episodes wait for places: more workers; workers idle: one of them drains

One asyncio loop owns all state, and every change of it beats `changed`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.rollout import RolloutConfig
from vz_ray.data.task import Task
from vz_ray.episode.trajectory import EpisodeId, Sampling, Trajectory
from vz_ray.observe.deadline import within
from vz_ray.observe.scaler import Scaler
from vz_ray.rollout.engine_stats import Room
from vz_ray.rollout.state import Event, WorkerState, after
from vz_ray.rollout.worker import WorkerStats
from vz_ray.weights.publisher import Publisher, PublishReport, Sender, Update
from vz_ray.weights.verify import Probe

log = logging.getLogger(__name__)

_SCALE_S = 0.5
"""How often the load is looked at."""


class WorkerLost(RuntimeError):
    """The worker is gone, or of no use: what it was doing must be done elsewhere."""


class FleetFailed(RuntimeError):
    """No worker can be had; says why the last ones could not."""


class RemoteWorker(Protocol):
    """A worker, wherever it runs. Every method may raise `WorkerLost`."""

    name: str
    pulls: bool
    """Its node may be reclaimed at any moment, so it pulls weights rather than being in a group."""
    room: Room | None
    """What it could still take in when it last said so: with each episode and each health check."""

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
class Member:
    """A worker and what is known of it. `load` counts episodes that it plays or is to play."""

    worker: RemoteWorker
    state: WorkerState = WorkerState.STARTING
    load: int = 0
    why: str = ""
    extra: bool = False
    ended: bool = False

    @property
    def room(self) -> Room | None:
        return self.worker.room


@dataclass(frozen=True, slots=True)
class Seat:
    """A member at one moment, for people and metrics."""

    name: str
    state: WorkerState
    load: int
    why: str


class Pulse:
    """Wakes whoever waits for a change of the crew; changes themselves never wait."""

    def __init__(self) -> None:
        self._beat = asyncio.Event()

    def beat(self) -> None:
        self._beat.set()
        self._beat = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._beat.wait()


class Crew:
    """Workers, and whoever waits for one.

    Args:
        spawn: Makes a worker of that name, not started yet.
        config: How many, and their deadlines.
        publisher: Brings weights to workers.
        starts: Consecutive failures to start after which it gives up.

    Attributes:
        changed: Beats at every change.
        members: All workers there ever were, in order of their start.
        admitting: Whether groups may begin.
        waiting: Episodes of groups that have no worker yet.
        begun: Groups that have one and have not ended; between two attempts none of their episodes plays.
    """

    def __init__(
        self, spawn: Callable[[str], RemoteWorker], config: RolloutConfig, publisher: Publisher, starts: int
    ) -> None:
        self._spawn, self._config, self._publisher, self._starts = spawn, config, publisher, starts
        self._sender: Sender | None = None
        self.members: list[Member] = []
        self.changed = Pulse()
        self.admitting, self.waiting, self.begun = True, 0, 0
        self._weights = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._born = 0
        self._failures: list[str] = []
        self._closed = False
        self._scaler = Scaler(
            least=config.workers,
            most=config.most_workers,
            each=config.episodes_per_worker,
            grow_s=config.grow_s,
            shrink_s=config.shrink_s,
        )

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
        ready = self.wait_for(lambda: any(s.state is WorkerState.READY for s in self.members))
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

    def seats(self) -> list[Seat]:
        """All workers there ever were, in order of their start."""
        return [Seat(s.worker.name, s.state, s.load, s.why) for s in self.members]

    async def stats(self) -> list[WorkerStats]:
        """Counts of the ready workers; one that does not answer is left out."""
        deadline = self._config.turn_deadline_s
        ready = [s.worker for s in self.members if s.state is WorkerState.READY]
        asked = [within(deadline, w.stats(), who=w.name, what="its stats") for w in ready]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, WorkerStats)]

    async def close(self) -> None:
        """Ends all workers. Whoever waits for a group gets `FleetFailed`."""
        self._closed = True
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        for member in self.members:
            await self.lose(member, "the fleet was closed")
            await self._end(member)

    def _add(self) -> None:
        self._born += 1
        # The fleet does not depend on one that comes beside those it needs.
        extra = len(self._staying()) >= max(1, self._config.workers)
        member = Member(self._spawn(f"rollout-{self._born - 1}"), extra=extra)
        self.members.append(member)
        self._keep(self._bring_up(member))

    async def _bring_up(self, member: Member) -> None:
        """Starts a worker and gives it the present weights."""
        worker, deadline = member.worker, self._config.start_deadline_s
        try:
            await within(deadline, worker.start(), who=worker.name, what="starting")
            async with self._weights:
                if member.state is WorkerState.DEAD:
                    return  # let go before it was there
                self._step(member, Event.STARTED)
                if self._publisher.current is not None:
                    current = self._publisher.current
                    report = await self._publisher.deliver(
                        current, [worker], sender=self._sender, joining=True
                    )
                    if report.failed:
                        raise WorkerLost(report.failed[worker.name])
                self._step(member, Event.SYNCED)
            self._failures.clear()
        except Exception as error:
            if member.state is not WorkerState.DEAD and not member.extra:
                self._failures.append(f"{worker.name}: {type(error).__name__}: {error}")
            await self.lose(member, str(error))

    def _step(self, member: Member, event: Event) -> None:
        member.state = after(member.state, event)
        self.changed.beat()

    async def lose(self, member: Member, why: str) -> None:
        """Marks a worker dead, ends what is left of it, and starts another in its place."""
        if member.state is WorkerState.DEAD:
            return
        member.why = why
        self._step(member, Event.DIED)
        if not self._closed:
            log.warning("%s is out of service: %s", member.worker.name, why)
            if len(self._failures) < self._starts and len(self._staying()) < self._config.workers:
                self._add()
        await self._end(member)

    def _staying(self) -> list[Member]:
        """Workers that play, or will."""
        gone = (WorkerState.DEAD, WorkerState.DRAINING)
        return [member for member in self.members if member.state not in gone]

    async def _scale(self) -> None:
        """Starts and lets go workers as the load asks."""
        while True:
            await asyncio.sleep(_SCALE_S)
            staying = self._staying()
            load = sum(member.load for member in staying) + self.waiting
            target = self._scaler.target(time.monotonic(), len(staying), load)
            for _ in range(target - len(staying)):
                self._add()
            # One that gets weights at this moment could not finish what it plays.
            spare = [member for member in staying if member.state is not WorkerState.SYNCING]
            if target < len(staying) and spare:
                first = min(spare, key=lambda member: (member.state is WorkerState.READY, member.load))
                self._drain(first, "fewer workers will do")

    def _drain(self, member: Member, why: str) -> None:
        """Gives a worker no new episodes, and ends it when it has played those that it has."""
        log.info("%s is to go: %s", member.worker.name, why)
        member.why = why
        self._step(member, Event.DRAIN)
        self._keep(self._let_go(member))

    async def _let_go(self, member: Member) -> None:
        # Its episodes have deadlines of their own, and leave it in any case.
        await self.changed.until(lambda: not member.load or member.state is WorkerState.DEAD)
        if member.state is WorkerState.DRAINING:
            self._step(member, Event.EMPTY)
        await self._end(member)

    async def _end(self, member: Member) -> None:
        if member.ended:
            return
        try:
            await within(60, member.worker.end(), who=member.worker.name, what="ending")
        except Exception as error:
            log.warning("%s did not end cleanly: %s", member.worker.name, error)
        member.ended = True

    async def _watch(self) -> None:
        """Finds workers that died while nobody asked anything of them, and those that will have to go."""
        while True:
            await asyncio.sleep(self._config.health_every_s)
            for member in [s for s in self.members if s.state is WorkerState.READY]:
                if why := member.worker.notice():
                    self._drain(member, why)
                    if len(self._staying()) < self._config.workers:
                        self._add()
            ready = [s for s in self.members if s.state is WorkerState.READY]
            await asyncio.gather(*(self._probe_health(member) for member in ready))

    async def _probe_health(self, member: Member) -> None:
        worker = member.worker
        try:
            await within(self._config.turn_deadline_s, worker.check(), who=worker.name, what="a health check")
        except Exception as error:
            await self.lose(member, str(error))

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
        # Stands still before it holds the weights: a worker that takes the place of a lost one needs them.
        async with self._standstill() if finish_first else contextlib.nullcontext(), self._weights:
            began, self._sender = time.monotonic(), sender
            update = await self._publisher.prepare(version, sender)
            return await self._deliver(update, sender, time.monotonic() - began)

    @contextlib.asynccontextmanager
    async def _standstill(self) -> AsyncIterator[None]:
        """No group begins inside, and those that have begun have ended."""
        self.admitting = False
        try:
            still = self.wait_for(lambda: not self.begun)
            # Each episode has its own deadline, for each of its attempts.
            once_s = 2 * (self._config.episode_deadline_s + self._config.turn_deadline_s)
            most_s = self._config.attempts * once_s
            await within(most_s, still, who="fleet", what="the episodes in flight before an update")
            yield
        finally:
            self.admitting = True
            self.changed.beat()

    async def _deliver(self, update: Update, sender: Sender, prepare_s: float) -> PublishReport:
        members = [s for s in self.members if s.state is WorkerState.READY]
        for member in members:
            self._step(member, Event.PUBLISH)
        workers = [s.worker for s in members]
        try:
            report = await self._publisher.deliver(update, workers, sender=sender, prepare_s=prepare_s)
        except BaseException as error:
            for member in members:
                self._keep(self.lose(member, str(error)))
            raise
        for member in members:
            if (why := report.failed.get(member.worker.name)) is not None:
                self._keep(self.lose(member, why))
            elif member.state is WorkerState.SYNCING:
                self._step(member, Event.SYNCED)
        return report

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits until `condition` holds; a fleet that cannot start workers raises instead."""

        def over() -> bool:
            return condition() or self._closed or self._hopeless()

        await self.changed.until(over)
        if self._closed:
            raise FleetFailed("the fleet was closed")
        if not condition():
            raise FleetFailed(
                f"no rollout worker can be started: {'; '.join(self._failures[-self._starts :])}"
            )

    def _hopeless(self) -> bool:
        alive = any(s.state is not WorkerState.DEAD for s in self.members)
        return not alive and len(self._failures) >= self._starts
