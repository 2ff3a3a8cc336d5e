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

from vz_ray.config.clips import ClipsConfig
from vz_ray.decode.admission import ByteLimiter
from vz_ray.decode.autoscaler import DecodeAutoscaler
from vz_ray.decode.decoder import start_decoder
from vz_ray.decode.router import DecoderRouter, decoder_name
from vz_ray.monitoring.log_context import RunIdentity
from vz_ray.utils.code_fingerprint import code_fingerprint
from vz_ray.utils.errors import UserError
from vz_ray.utils.timeouts import StepTimeout, with_timeout
from vz_ray.video.clip_reader import DECODER_BACKENDS, ReaderStats
from vz_ray.video.errors import DecoderDiedError, UnexpectedReadError, VideoError, VideoQuarantinedError
from vz_ray.video.frame import (
    Clip,
    Frame,
    FrameRef,
    FrameSize,
    ImageRequest,
    OverviewRequest,
    SelectedFramesRequest,
    VideoInfo,
    ZoomRequest,
)
from vz_ray.video.video_file import is_url

log = logging.getLogger(__name__)

_ANSWER_S = 3.0
"""An actor whose watch thread does not answer within this is stuck."""

_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class DecodePoolStats:
    """What the pool has done.

    Attributes:
        reader: Sum over the actors, each since it was last restarted.
        num_decoders: How many serve, as this handle knows.
        unresponsive: Names of actors that did not answer.
        retried: Attempts after the first, by this handle.
        timed_out: Attempts that ran past their deadline, by this handle.
        lost: Attempts whose actor died, by this handle.
        killed: Stuck actors that this handle killed.
        coalesced: Requests of this handle that were answered by one in flight.
        in_flight_bytes: Frames asked for by this handle and not delivered yet, at most.
        peak_in_flight_bytes: The most that this ever was.
        quarantined: Videos that this handle does not ask for any more, and why.
    """

    reader: ReaderStats
    unresponsive: tuple[str, ...]
    retried: int
    timed_out: int
    lost: int
    killed: int
    num_decoders: int = 0
    coalesced: int = 0
    in_flight_bytes: int = 0
    peak_in_flight_bytes: int = 0
    quarantined: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _RequestCounters:
    retried: int = 0
    timed_out: int = 0
    lost: int = 0
    killed: int = 0
    coalesced: int = 0


@dataclass(frozen=True, slots=True)
class DecodeClientStats:
    """What one handle has of the pool; sums over handles are meaningful.

    Attributes:
        in_flight: Requests that are with a decoder now.
        waiting: Requests that wait at the gate now.
        retried: Attempts after the first, since the handle was made.
        timed_out: Attempts that ran past their deadline.
        lost: Attempts whose actor died.
        killed: Stuck actors that it killed.
        quarantined: Videos that it does not ask for any more.
    """

    in_flight: int = 0
    waiting: int = 0
    retried: int = 0
    timed_out: int = 0
    lost: int = 0
    killed: int = 0
    quarantined: int = 0

    def __add__(self, other: DecodeClientStats) -> DecodeClientStats:
        return DecodeClientStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class _LoopState:
    """What belongs to one event loop: a handle may be used in one after another."""

    def __init__(self, loop: asyncio.AbstractEventLoop, config: ClipsConfig) -> None:
        self.loop, self.gate = loop, ByteLimiter(config.max_in_flight_mib * 2**20, config.queue_timeout_s)
        self.suspects = asyncio.Lock()
        self.shared: dict[Hashable, _InFlightRequest] = {}


@dataclass(slots=True)
class _InFlightRequest:
    """A request in flight, and how many wait for it."""

    task: asyncio.Task[Any]
    waiting: int = 0


class DecodePool:
    """Frames from a pool of decode actors; a `FrameSource`.

    Give the handle itself to Ray actors that need frames: a copy has the same
    actors but counts its own load and failures.

    Raises (every request):
        VideoError: The video cannot be read as asked; `DecoderDiedError` if actors died at every attempt;
            `VideoQuarantinedError` if it is not tried any more.
        UserError: An actor was restarted on a node of another version of the code.
        Overdue: The last attempt ran past `deadline_s`; it names that actor and the request.
    """

    def __init__(self, roster: DecoderRouter, config: ClipsConfig, keeper: Any | None = None) -> None:
        self._router, self._config, self._autoscaler = roster, config, keeper
        self._counts = _RequestCounters()
        self._lives: Counter[int] = Counter()
        self._suspected: dict[str, set[tuple[int, int]]] = {}
        self._quarantined: dict[str, str] = {}
        self._at: _LoopState | None = None

    @classmethod
    def start(cls, config: ClipsConfig, badge: RunIdentity = RunIdentity()) -> DecodePool:  # noqa: B008 - frozen
        """Starts the actors; they live until `close`, or until no handle is left.

        Their logs and metrics are those of the run that `badge` names.

        Raises:
            UserError: The decoder that `config` asks for cannot be loaded.
        """
        DECODER_BACKENDS[config.decoder]()
        driver = code_fingerprint()
        actors = {
            slot: start_decoder(decoder_name(slot), driver, config, badge)
            for slot in range(config.num_actors)
        }
        keeper = None
        if config.actor_limit > config.num_actors:
            keeper = DecodeAutoscaler.remote(driver, config, actors, badge)  # type: ignore[attr-defined]
        return cls(DecoderRouter(actors, actors, keeper, config.max_load_imbalance), config, keeper)

    def __reduce__(self) -> tuple[type[DecodePool], tuple[DecoderRouter, ClipsConfig, Any | None]]:
        return (DecodePool, (self._router, self._config, self._autoscaler))

    def close(self) -> None:
        """Kills the actors, for every handle."""
        if self._autoscaler is not None:
            ray.kill(self._autoscaler, no_restart=True)  # and with it those that it started
        for actor in self._router.actors.values():
            ray.kill(actor, no_restart=True)

    async def wait_until_ready(self, timeout_s: float = 120.0) -> None:
        """Returns when every actor answers; `StepTimeout` names the first that does not.

        Raises:
            UserError: One is on a node of another version of the code.
        """
        for slot, actor in self._router.actors.items():
            try:
                await with_timeout(
                    actor.busy_s.remote(), timeout_s, target=decoder_name(slot), operation="its start"
                )
            except RayTaskError as error:
                raise error.cause from error

    async def probe(self, uri: str) -> VideoInfo:
        found: VideoInfo = await self._once(
            ("probe", uri), uri, f"probe of {uri}", 0, lambda actor: actor.probe.remote(uri)
        )
        return found

    async def overview(
        self, uri: str, request: OverviewRequest | SelectedFramesRequest | ImageRequest, size: FrameSize
    ) -> Clip:
        clip: Clip = await self._once(
            (uri, request, size),
            uri,
            f"overview of {uri}",
            self._bytes(request.max_frames, size.max_pixels),
            lambda actor: actor.overview.remote(uri, request, size),
        )
        return clip

    async def zoom(self, uri: str, request: ZoomRequest, size: FrameSize) -> Clip:
        try:
            frames = request.num_frames
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

    async def stats(self) -> DecodePoolStats:
        actors = dict(self._router.actors)
        asked = [
            with_timeout(actor.stats.remote(), _ANSWER_S, target=decoder_name(slot), operation="statistics")
            for slot, actor in actors.items()
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        read = sum((a for a in answers if isinstance(a, ReaderStats)), start=ReaderStats())
        silent = [
            decoder_name(slot)
            for slot, a in zip(actors, answers, strict=True)
            if not isinstance(a, ReaderStats)
        ]
        counts = self._counts
        gate = self._here().gate
        return DecodePoolStats(
            reader=read,
            unresponsive=tuple(silent),
            num_decoders=len(actors),
            retried=counts.retried,
            timed_out=counts.timed_out,
            lost=counts.lost,
            killed=counts.killed,
            coalesced=counts.coalesced,
            in_flight_bytes=gate.reserved_bytes,
            peak_in_flight_bytes=gate.peak_bytes,
            quarantined=dict(self._quarantined),
        )

    def client_stats(self) -> DecodeClientStats:
        """What this handle does now, and has done; asks nobody."""
        counts = self._counts
        return DecodeClientStats(
            in_flight=sum(self._router.in_flight.values()),
            waiting=self._at.gate.waiting if self._at is not None else 0,
            retried=counts.retried,
            timed_out=counts.timed_out,
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

    def _here(self) -> _LoopState:
        loop = asyncio.get_running_loop()
        if self._at is None or self._at.loop is not loop:
            self._at = _LoopState(loop, self._config)
            self._router.reset_load()
        return self._at

    def _bytes(self, frames: int, pixels: int) -> int:
        return max(0, min(frames, self._config.max_request_frames)) * pixels * 3

    async def _once(self, key: Hashable, uri: str, what: str, size: int, call: Callable[[Any], Any]) -> Any:
        """Shares the answer of the same request in flight; who leaves does not take it from the others."""
        here = self._here()
        shared = here.shared.get(key)
        if shared is None:
            shared = _InFlightRequest(asyncio.create_task(self._gated(here, uri, what, size, call)))
            here.shared[key] = shared
            shared.task.add_done_callback(lambda _: here.shared.pop(key, None))
        else:
            self._counts.coalesced += 1
        shared.waiting += 1
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.waiting -= 1
            if not shared.waiting and not shared.task.done():
                here.shared.pop(key, None)
                shared.task.cancel()

    async def _gated(
        self, here: _LoopState, uri: str, what: str, size: int, call: Callable[[Any], Any]
    ) -> Any:
        self._check_quarantine(uri)
        await self._router.refresh()
        async with here.gate.reserve(size, what):
            return await self._ask(here, uri, what, call)

    async def _ask(self, here: _LoopState, uri: str, what: str, call: Callable[[Any], Any]) -> Any:
        """Tries the request on one actor after another; bounded by `attempts`."""
        tried: set[int] = set()
        failure: Exception = AssertionError("no attempt was made")
        for attempt in range(self._config.max_attempts):
            self._counts.retried += attempt > 0
            slot = self._router.route(uri, tried)
            async with self._alone_if_suspect(here, uri, what):
                life = (slot, self._lives[slot])
                self._check_quarantine(uri)
                try:
                    if slot in tried:
                        await self._back(slot, what)
                    if is_url(uri):
                        fetching, most_s = f"fetching {uri}", self._config.download_timeout_s
                        await self._attempt(slot, fetching, lambda actor: actor.fetch.remote(uri), most_s)
                    answer = await self._attempt(slot, what, call, self._config.timeout_s)
                    self._suspected.pop(uri, None)
                    return answer
                except StepTimeout as overdue:
                    failure = overdue
                    self._counts.timed_out += 1
                    if await self._kill_if_stuck(slot):
                        stuck = f"a decoder was stuck for {self._config.timeout_s:g} s during {what}"
                        self._suspect(uri, stuck, life)
                except (RayActorError, ObjectLostError) as died:
                    self._counts.lost += 1
                    failure = DecoderDiedError(
                        f"{uri}: {decoder_name(slot)} died during {what} ({type(died).__name__}), "
                        f"attempt {attempt + 1} of {self._config.max_attempts}",
                        "the video could not be read",
                    )
                    await self._router.sync()
                    if slot in self._router.actors:  # else it was ended on purpose
                        self._suspect(uri, f"a decoder died during {what}", life)
                except UnexpectedReadError as broken:
                    raise UnexpectedReadError(f"{uri}: {broken}", broken.model_message) from broken
            tried.add(slot)
        raise failure

    @asynccontextmanager
    async def _alone_if_suspect(self, here: _LoopState, uri: str, what: str) -> AsyncIterator[None]:
        if uri not in self._suspected:
            yield
            return
        who = "other requests that were with a decoder when it died"
        await with_timeout(
            here.suspects.acquire(),
            self._config.queue_timeout_s,
            target=who,
            operation=f"their retry before {what}",
        )
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
            raise VideoQuarantinedError(
                f"{uri}: in quarantine ({self._quarantined[uri]}); convert it or take it out",
                "the video could not be read",
            )

    async def _attempt(self, slot: int, what: str, call: Callable[[Any], Any], deadline_s: float) -> Any:
        self._router.in_flight[slot] += 1
        answer = call(self._router.known_actors[slot])
        try:
            return await with_timeout(answer, deadline_s, target=decoder_name(slot), operation=what)
        except RayTaskError as error:
            if isinstance(error.cause, VideoError | UserError):
                raise error.cause from None
            raise
        except (StepTimeout, asyncio.CancelledError):
            ray.cancel(answer)  # if it still waits in the actor's queue, nobody needs it
            raise
        finally:
            self._router.in_flight[slot] -= 1

    async def _back(self, slot: int, what: str) -> None:
        """Waits until an actor that failed before answers again."""

        async def answers() -> None:
            while True:
                try:
                    await self._router.known_actors[slot].busy_s.remote()
                    return
                except RayActorError:
                    await asyncio.sleep(_POLL_S)

        await with_timeout(
            answers(), self._config.timeout_s, target=decoder_name(slot), operation=f"its restart for {what}"
        )

    async def _kill_if_stuck(self, slot: int) -> bool:
        """Whether it was stuck and so was killed (Ray restarts it); one merely behind is left alone."""
        actor = self._router.actors.get(slot)
        if actor is None:
            return False  # it has left the pool
        try:
            busy = await with_timeout(
                actor.busy_s.remote(), _ANSWER_S, target=decoder_name(slot), operation="a sign of life"
            )
        except RayActorError:
            return False  # dead already, so being restarted
        except StepTimeout:
            busy = float("inf")
        if busy < self._config.timeout_s:
            return False
        await self._note_stacks(slot, actor)
        self._counts.killed += 1
        ray.kill(actor, no_restart=False)
        return True

    async def _note_stacks(self, slot: int, actor: Any) -> None:
        """Logs where a stuck actor is, if it can still say so."""
        try:
            where = await with_timeout(
                actor.stacks.remote(), _ANSWER_S, target=decoder_name(slot), operation="its stacks"
            )
        except (StepTimeout, RayActorError) as error:
            where = f"it does not answer: {error}"
        log.warning("%s is stuck and will be killed:\n%s", decoder_name(slot), where)
