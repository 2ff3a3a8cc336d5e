"""The crew: which workers there are, from their start to their end, and the weights that they hold.

    start, scale --> a worker starts, and gets the present weights before its first token
    publish      --> every ready worker pauses, receives, is checked, resumes;
                     one that fails is killed and replaced
    watch        --> one that died is replaced; one whose node is about to go drains
    upkeep       --> those that could not be had before are tried again; a lack of any is told
    scale        --> episodes wait for places: more workers; workers idle: one of them drains

One asyncio loop owns all state, and every change of it beats `changed`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from vz_ray.config.rollout import RolloutConfig
from vz_ray.observe.deadline import Overdue, within
from vz_ray.observe.scaler import Scaler
from vz_ray.rollout.absence import Absence
from vz_ray.rollout.member import Member, NoPlace, RemoteWorker, Seat, WorkerLost
from vz_ray.rollout.state import Event, WorkerState, after
from vz_ray.rollout.worker import WorkerStats
from vz_ray.weights.publisher import Publisher, PublishReport, Sender, Update

log = logging.getLogger(__name__)

_SCALE_S = 0.5
"""How often the load is looked at."""
_FIRST_WORD_S, _NEXT_WORD_S = 10.0, 60.0
"""When a fleet without a worker says so, and how often again."""


class FleetFailed(RuntimeError):
    """No worker can be had; says why the last ones could not."""


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
        lost: Workers that died, or never came.
        begun: Groups that have one and have not ended; between two attempts none of their episodes plays.
    """

    def __init__(
        self, spawn: Callable[[str], RemoteWorker], config: RolloutConfig, publisher: Publisher, starts: int
    ) -> None:
        self._spawn, self._config, self._publisher, self._starts = spawn, config, publisher, starts
        self._sender: Sender | None = None
        self.members: list[Member] = []
        self.changed = Pulse()
        self.admitting, self.waiting, self.begun, self.lost = True, 0, 0, 0
        self._weights = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._born = 0
        self._failures: list[str] = []
        self._absence = Absence(_FIRST_WORD_S, _NEXT_WORD_S)
        self._given_up = ""
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
        self._keep(self._upkeep())
        if self._config.most_workers > self._config.workers:
            self._keep(self._scale())
        if not self._config.workers:
            return
        ready = self.wait_for(lambda: any(s.state is WorkerState.READY for s in self.members))
        deadline, what = self._config.start_deadline_s, "starting its first worker"
        try:
            await within(deadline, ready, who="fleet", what=what)
        except BaseException as error:
            why = self._last_loss()
            await self.close()
            if isinstance(error, Overdue):
                raise Overdue("fleet", what, deadline, why) from error
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
            member.served = True
            self._failures.clear()
        except NoPlace as error:
            await self.lose(member, str(error), again=False)
        except Exception as error:
            if member.state is not WorkerState.DEAD and not member.extra:
                self._failures.append(f"{worker.name}: {type(error).__name__}: {error}")
            await self.lose(member, str(error))
        else:
            await self._watch(member)

    def _step(self, member: Member, event: Event) -> None:
        member.state = after(member.state, event)
        self.changed.beat()

    async def lose(self, member: Member, why: str, *, again: bool = True) -> None:
        """Marks a worker dead, ends what is left of it, and starts another in its place.

        Not `again` leaves the other to the upkeep.
        """
        if member.state is WorkerState.DEAD:
            return
        member.why = why
        self._step(member, Event.DIED)
        if not self._closed:
            self.lost += 1
            log.warning("%s is out of service: %s", member.worker.name, why)
            if member.served:
                self._failures.clear()
            if again and len(self._failures) < self._starts:
                self._make_up()
        await self._end(member)

    def _make_up(self) -> None:
        """Starts as many workers as there are too few."""
        for _ in range(self._config.workers - len(self._staying())):
            self._add()

    def _serving(self) -> bool:
        """Whether any worker plays."""
        return any(s.state not in (WorkerState.STARTING, WorkerState.DEAD) for s in self.members)

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

    async def _watch(self, member: Member) -> None:
        """Finds out if a worker dies while nobody asks anything of it, or will have to go."""
        worker, deadline = member.worker, self._config.turn_deadline_s
        while member.state in (WorkerState.READY, WorkerState.SYNCING):
            await asyncio.sleep(self._config.health_every_s)
            if member.state is not WorkerState.READY:
                continue
            try:
                await within(deadline, worker.check(), who=worker.name, what="a health check")
                why = await within(deadline, worker.notice(), who=worker.name, what="word of its node")
            except Exception as error:
                await self.lose(member, str(error))
                return
            if why and member.state is WorkerState.READY:
                self._drain(member, why)
                self._make_up()

    async def _upkeep(self) -> None:
        """Tries again to have as many workers as there should be, and tells when there is none at all."""
        while True:
            await asyncio.sleep(self._config.health_every_s)
            # Without any that plays, failures to start are counted, and are the end in a while.
            if len(self._failures) < self._starts or self._serving():
                self._make_up()
            self._tell_absence(time.monotonic())

    def _tell_absence(self, now_s: float) -> None:
        absent = bool(self.waiting or self.begun) and not self._serving()
        seconds, most_s = self._absence.seconds(now_s, absent), self._config.nodes_deadline_s
        if self._absence.to_say(now_s):
            coming = ", ".join(s.worker.name for s in self._staying()) or "none"
            log.warning(
                "no rollout worker for %.0f s: %d episodes wait, and %d groups in part; to come: %s",
                *(seconds, self.waiting, self.begun, coming),
            )
        if seconds > most_s:
            self._given_up = f"for {seconds:.0f} s there was none (rollout.nodes_deadline_s is {most_s:g})"
            self.changed.beat()

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
            why = self._failures[-self._starts :] or [self._given_up, self._last_loss()]
            raise FleetFailed(f"no rollout worker can be started: {'; '.join(filter(None, why))}")

    def _last_loss(self) -> str:
        """Why the last worker that was lost was lost; empty if none was."""
        return next((member.why for member in reversed(self.members) if member.why), "")

    def _hopeless(self) -> bool:
        if self._given_up:
            return True
        alive = any(s.state is not WorkerState.DEAD for s in self.members)
        return not alive and len(self._failures) >= self._starts
