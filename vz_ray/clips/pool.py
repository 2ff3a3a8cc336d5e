"""The handle through which everyone asks for frames.

    the same request in flight already  -> its answer is shared
    quarantine, then the gate           -> bytes in flight are bounded, askers take turns
    the actor that has the video open   -> or the idlest, where that one is behind
    an attempt with a deadline          -> an actor that died is restarted by Ray, one that hangs is
                                           killed first, and the request is tried on another

A request that was with an actor when it died is a suspect: suspects are tried
again one at a time, so that an innocent one is not killed again beside the
culprit. A video whose requests were suspects too often in a row is quarantined.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from vz_ray.clips.actor import start_decoder
from vz_ray.clips.gate import ByteGate
from vz_ray.clips.keeper import PoolKeeper
from vz_ray.clips.roster import Roster, name
from vz_ray.config.clips import ClipsConfig
from vz_ray.observe.deadline import Overdue, within
from vz_ray.observe.errors import UserError
from vz_ray.observe.fingerprint import fingerprint
from vz_ray.observe.records import Badge
from vz_ray.video.clip_reader import DECODERS, ReadStats
from vz_ray.video.errors import DecoderLost, Quarantined, ReaderBroken, VideoError
from vz_ray.video.frame import Chosen, Clip, Frame, FrameRef, FrameSize, Overview, Still, VideoInfo, Zoom
from vz_ray.video.source import is_remote

log = logging.getLogger(__name__)

_ANSWER_S = 3.0
"""An actor whose watch thread does not answer within this is stuck."""

_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class PoolStats:
    """What the pool has done.

    Attributes:
        read: Sum over the actors, each since it was last restarted.
        actors: How many serve, as this handle knows.
        silent: Names of actors that did not answer.
        retried: Attempts after the first, by this handle.
        overdue: Attempts that ran past their deadline, by this handle.
        lost: Attempts whose actor died, by this handle.
        killed: Stuck actors that this handle killed.
        shared: Requests of this handle that were answered by one in flight.
        in_flight_bytes: Frames asked for by this handle and not delivered yet, at most.
        in_flight_peak: The most that this ever was.
        quarantined: Videos that this handle does not ask for any more, and why.
    """

    read: ReadStats
    silent: tuple[str, ...]
    retried: int
    overdue: int
    lost: int
    killed: int
    actors: int = 0
    shared: int = 0
    in_flight_bytes: int = 0
    in_flight_peak: int = 0
    quarantined: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Counts:
    retried: int = 0
    overdue: int = 0
    lost: int = 0
    killed: int = 0
    shared: int = 0


@dataclass(frozen=True, slots=True)
class HandleStats:
    """What one handle has of the pool; sums over handles are meaningful.

    Attributes:
        in_flight: Requests that are with a decoder now.
        waiting: Requests that wait at the gate now.
        retried: Attempts after the first, since the handle was made.
        overdue: Attempts that ran past their deadline.
        lost: Attempts whose actor died.
        killed: Stuck actors that it killed.
        quarantined: Videos that it does not ask for any more.
    """

    in_flight: int = 0
    waiting: int = 0
    retried: int = 0
    overdue: int = 0
    lost: int = 0
    killed: int = 0
    quarantined: int = 0

    def __add__(self, other: HandleStats) -> HandleStats:
        return HandleStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class _Loop:
    """What belongs to one event loop: a handle may be used in one after another."""

    def __init__(self, loop: asyncio.AbstractEventLoop, config: ClipsConfig) -> None:
        self.loop, self.gate = loop, ByteGate(config.in_flight_mb * 2**20, config.wait_s)
        self.suspects = asyncio.Lock()
        self.shared: dict[Hashable, _Shared] = {}


@dataclass(slots=True)
class _Shared:
    """A request in flight, and how many wait for it."""

    task: asyncio.Task[Any]
    waiting: int = 0


class ClipPool:
    """Frames from a pool of decode actors; a `FrameSource`.

    Give the handle itself to Ray actors that need frames: a copy has the same
    actors but counts its own load and failures.

    Raises (every request):
        VideoError: The video cannot be read as asked; `DecoderLost` if actors died at every attempt;
            `Quarantined` if it is not tried any more.
        UserError: An actor was restarted on a node of another version of the code.
        Overdue: The last attempt ran past `deadline_s`; it names that actor and the request.
    """

    def __init__(self, roster: Roster, config: ClipsConfig, keeper: Any | None = None) -> None:
        self._roster, self._config, self._keeper = roster, config, keeper
        self._counts = _Counts()
        self._lives: Counter[int] = Counter()
        self._suspected: dict[str, set[tuple[int, int]]] = {}
        self._quarantined: dict[str, str] = {}
        self._at: _Loop | None = None

    @classmethod
    def start(cls, config: ClipsConfig, badge: Badge = Badge()) -> ClipPool:  # noqa: B008 - frozen
        """Starts the actors; they live until `close`, or until no handle is left.

        Their logs and metrics are those of the run that `badge` names.

        Raises:
            UserError: The decoder that `config` asks for cannot be loaded.
        """
        DECODERS[config.decoder]()
        driver = fingerprint()
        actors = {slot: start_decoder(name(slot), driver, config, badge) for slot in range(config.actors)}
        keeper = None
        if config.most_actors > config.actors:
            keeper = PoolKeeper.remote(driver, config, actors, badge)  # type: ignore[attr-defined]
        return cls(Roster(actors, actors, keeper, config.spill), config, keeper)

    def __reduce__(self) -> tuple[type[ClipPool], tuple[Roster, ClipsConfig, Any | None]]:
        return (ClipPool, (self._roster, self._config, self._keeper))

    def close(self) -> None:
        """Kills the actors, for every handle."""
        if self._keeper is not None:
            ray.kill(self._keeper, no_restart=True)  # and with it those that it started
        for actor in self._roster.actors.values():
            ray.kill(actor, no_restart=True)

    async def ready(self, deadline_s: float = 120.0) -> None:
        """Returns when every actor answers; `Overdue` names the first that does not.

        Raises:
            UserError: One is on a node of another version of the code.
        """
        for slot, actor in self._roster.actors.items():
            try:
                await within(deadline_s, actor.busy_s.remote(), who=name(slot), what="its start")
            except RayTaskError as error:
                raise error.cause from error

    async def probe(self, uri: str) -> VideoInfo:
        found: VideoInfo = await self._once(
            ("probe", uri), uri, f"probe of {uri}", 0, lambda actor: actor.probe.remote(uri)
        )
        return found

    async def overview(self, uri: str, request: Overview | Chosen | Still, size: FrameSize) -> Clip:
        clip: Clip = await self._once(
            (uri, request, size),
            uri,
            f"overview of {uri}",
            self._bytes(request.max_frames, size.max_pixels),
            lambda actor: actor.overview.remote(uri, request, size),
        )
        return clip

    async def zoom(self, uri: str, request: Zoom, size: FrameSize) -> Clip:
        try:
            frames = request.frame_count
        except (ValueError, OverflowError):  # not finite; the reader says so
            frames = 0
        clip: Clip = await self._once(
            (uri, request, size),
            uri,
            f"zoom of {uri} [{request.start_s:g}, {request.end_s:g}] at {request.fps:g} fps",
            self._bytes(frames, size.max_pixels),
            lambda actor: actor.zoom.remote(uri, request, size),
        )
        return clip

    async def resolve(self, refs: Sequence[FrameRef]) -> list[Frame]:
        by_uri: dict[str, list[int]] = {}
        for place, ref in enumerate(refs):
            by_uri.setdefault(ref.uri, []).append(place)
        batches = [[refs[place] for place in places] for places in by_uri.values()]
        answers = await asyncio.gather(*(self._resolve_one(batch) for batch in batches))
        frames: dict[int, Frame] = {}
        for places, answer in zip(by_uri.values(), answers, strict=True):
            frames.update(zip(places, answer, strict=True))
        return [frames[place] for place in range(len(refs))]

    async def stats(self) -> PoolStats:
        actors = dict(self._roster.actors)
        asked = [
            within(_ANSWER_S, actor.stats.remote(), who=name(slot), what="statistics")
            for slot, actor in actors.items()
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        read = sum((a for a in answers if isinstance(a, ReadStats)), start=ReadStats())
        silent = [name(slot) for slot, a in zip(actors, answers, strict=True) if not isinstance(a, ReadStats)]
        counts = self._counts
        gate = self._here().gate
        return PoolStats(
            read=read,
            silent=tuple(silent),
            actors=len(actors),
            retried=counts.retried,
            overdue=counts.overdue,
            lost=counts.lost,
            killed=counts.killed,
            shared=counts.shared,
            in_flight_bytes=gate.held,
            in_flight_peak=gate.peak,
            quarantined=dict(self._quarantined),
        )

    def handle(self) -> HandleStats:
        """What this handle does now, and has done; asks nobody."""
        counts = self._counts
        return HandleStats(
            in_flight=sum(self._roster.in_flight.values()),
            waiting=self._at.gate.waiting if self._at is not None else 0,
            retried=counts.retried,
            overdue=counts.overdue,
            lost=counts.lost,
            killed=counts.killed,
            quarantined=len(self._quarantined),
        )

    async def _resolve_one(self, refs: list[FrameRef]) -> list[Frame]:
        uri = refs[0].uri
        frames: list[Frame] = await self._once(
            tuple(refs),
            uri,
            f"{len(refs)} frames of {uri} by reference",
            sum(ref.width * ref.height * 3 for ref in refs),
            lambda actor: actor.resolve.remote(refs),
        )
        return frames

    def _here(self) -> _Loop:
        loop = asyncio.get_running_loop()
        if self._at is None or self._at.loop is not loop:
            self._at = _Loop(loop, self._config)
            self._roster.forget_load()
        return self._at

    def _bytes(self, frames: int, pixels: int) -> int:
        return max(0, min(frames, self._config.max_request_frames)) * pixels * 3

    async def _once(self, key: Hashable, uri: str, what: str, size: int, call: Callable[[Any], Any]) -> Any:
        """Shares the answer of the same request in flight; who leaves does not take it from the others."""
        here = self._here()
        shared = here.shared.get(key)
        if shared is None:
            shared = _Shared(asyncio.create_task(self._gated(here, uri, what, size, call)))
            here.shared[key] = shared
            shared.task.add_done_callback(lambda _: here.shared.pop(key, None))
        else:
            self._counts.shared += 1
        shared.waiting += 1
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.waiting -= 1
            if not shared.waiting and not shared.task.done():
                here.shared.pop(key, None)
                shared.task.cancel()

    async def _gated(self, here: _Loop, uri: str, what: str, size: int, call: Callable[[Any], Any]) -> Any:
        self._check_quarantine(uri)
        await self._roster.refresh()
        async with here.gate.hold(size, what):
            return await self._ask(here, uri, what, call)

    async def _ask(self, here: _Loop, uri: str, what: str, call: Callable[[Any], Any]) -> Any:
        """Tries the request on one actor after another; bounded by `attempts`."""
        tried: set[int] = set()
        failure: Exception = AssertionError("no attempt was made")
        for attempt in range(self._config.attempts):
            self._counts.retried += attempt > 0
            slot = self._roster.route(uri, tried)
            async with self._alone_if_suspect(here, uri, what):
                life = (slot, self._lives[slot])
                self._check_quarantine(uri)
                try:
                    if slot in tried:
                        await self._back(slot, what)
                    if is_remote(uri):
                        fetching, most_s = f"fetching {uri}", self._config.download_s
                        await self._attempt(slot, fetching, lambda actor: actor.fetch.remote(uri), most_s)
                    answer = await self._attempt(slot, what, call, self._config.deadline_s)
                    self._suspected.pop(uri, None)
                    return answer
                except Overdue as overdue:
                    failure = overdue
                    self._counts.overdue += 1
                    if await self._kill_if_stuck(slot):
                        stuck = f"a decoder was stuck for {self._config.deadline_s:g} s during {what}"
                        self._suspect(uri, stuck, life)
                except (RayActorError, ObjectLostError) as died:
                    self._counts.lost += 1
                    failure = DecoderLost(
                        f"{uri}: {name(slot)} died during {what} ({type(died).__name__}), "
                        f"attempt {attempt + 1} of {self._config.attempts}",
                        "the video could not be read",
                    )
                    await self._roster.hear()
                    if slot in self._roster.actors:  # else it was ended on purpose
                        self._suspect(uri, f"a decoder died during {what}", life)
                except ReaderBroken as broken:
                    raise ReaderBroken(f"{uri}: {broken}", broken.for_model) from broken
            tried.add(slot)
        raise failure

    @asynccontextmanager
    async def _alone_if_suspect(self, here: _Loop, uri: str, what: str) -> AsyncIterator[None]:
        if uri not in self._suspected:
            yield
            return
        who = "other requests that were with a decoder when it died"
        await within(self._config.wait_s, here.suspects.acquire(), who=who, what=f"their retry before {what}")
        try:
            yield
        finally:
            here.suspects.release()

    def _suspect(self, uri: str, why: str, life: tuple[int, int]) -> None:
        """Notes a failure that took a decoder with it, once for all requests that were with it.

        Args:
            uri: The video that was asked for.
            why: What happened.
            life: Slot of the decoder, and how many had died there before.
        """
        slot, before = life
        self._lives[slot] = max(self._lives[slot], before + 1)
        deaths = self._suspected.setdefault(uri, set())
        deaths.add(life)
        if len(deaths) >= self._config.quarantine_after and uri not in self._quarantined:
            self._quarantined[uri] = f"{why}, the last of {len(deaths)} such failures in a row"
            log.error("%s is in quarantine: %s", uri, self._quarantined[uri])

    def _check_quarantine(self, uri: str) -> None:
        if uri in self._quarantined:
            raise Quarantined(
                f"{uri}: in quarantine ({self._quarantined[uri]}); convert it or take it out",
                "the video could not be read",
            )

    async def _attempt(self, slot: int, what: str, call: Callable[[Any], Any], deadline_s: float) -> Any:
        self._roster.in_flight[slot] += 1
        answer = call(self._roster.known[slot])
        try:
            return await within(deadline_s, answer, who=name(slot), what=what)
        except RayTaskError as error:
            if isinstance(error.cause, VideoError | UserError):
                raise error.cause from None
            raise
        except (Overdue, asyncio.CancelledError):
            ray.cancel(answer)  # if it still waits in the actor's queue, nobody needs it
            raise
        finally:
            self._roster.in_flight[slot] -= 1

    async def _back(self, slot: int, what: str) -> None:
        """Waits until an actor that failed before answers again."""

        async def answers() -> None:
            while True:
                try:
                    await self._roster.known[slot].busy_s.remote()
                    return
                except RayActorError:
                    await asyncio.sleep(_POLL_S)

        await within(self._config.deadline_s, answers(), who=name(slot), what=f"its restart for {what}")

    async def _kill_if_stuck(self, slot: int) -> bool:
        """Whether it was stuck and so was killed (Ray restarts it); one merely behind is left alone."""
        actor = self._roster.actors.get(slot)
        if actor is None:
            return False  # it has left the pool
        try:
            busy = await within(_ANSWER_S, actor.busy_s.remote(), who=name(slot), what="a sign of life")
        except RayActorError:
            return False  # dead already, so being restarted
        except Overdue:
            busy = float("inf")
        if busy < self._config.deadline_s:
            return False
        await self._note_stacks(slot, actor)
        self._counts.killed += 1
        ray.kill(actor, no_restart=False)
        return True

    async def _note_stacks(self, slot: int, actor: Any) -> None:
        """Logs where a stuck actor is, if it can still say so."""
        try:
            where = await within(_ANSWER_S, actor.stacks.remote(), who=name(slot), what="its stacks")
        except (Overdue, RayActorError) as error:
            where = f"it does not answer: {error}"
        log.warning("%s is stuck and will be killed:\n%s", name(slot), where)
