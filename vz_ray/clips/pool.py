"""The handle through which everyone asks for frames.

Requests for one video go to the actor that has it open, unless that one is
behind. An attempt has a deadline; an actor that died is restarted by Ray, one
that hangs is killed first, and the request is tried on another.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from vz_ray.clips.actor import DecodeActor
from vz_ray.config.clips import ClipsConfig
from vz_ray.observe.deadline import Overdue, within
from vz_ray.video.clip_reader import ReadStats
from vz_ray.video.errors import DecoderLost, VideoError
from vz_ray.video.frame import Clip, Frame, FrameRef, FrameSize, Overview, VideoInfo, Zoom
from vz_ray.video.source import is_remote

_ANSWER_S = 3.0
"""An actor whose watch thread does not answer within this is stuck."""

_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class PoolStats:
    """What the pool has done.

    Attributes:
        read: Sum over the actors, each since it was last restarted.
        silent: Names of actors that did not answer.
        retried: Attempts after the first, by this handle.
        overdue: Attempts that ran past their deadline, by this handle.
        lost: Attempts whose actor died, by this handle.
        killed: Stuck actors that this handle killed.
    """

    read: ReadStats
    silent: tuple[str, ...]
    retried: int
    overdue: int
    lost: int
    killed: int


@dataclass(slots=True)
class _Counts:
    retried: int = 0
    overdue: int = 0
    lost: int = 0
    killed: int = 0
    in_flight: list[int] = field(default_factory=list)


class ClipPool:
    """Frames from a pool of decode actors; a `FrameSource`.

    Give the handle itself to Ray actors that need frames: a copy has the same
    actors but counts its own load and failures.

    Raises (every request):
        VideoError: The video cannot be read as asked; `DecoderLost` if actors died at every attempt.
        Overdue: The last attempt ran past `deadline_s`; it names that actor and the request.
    """

    def __init__(self, actors: Sequence[Any], config: ClipsConfig) -> None:
        self._actors, self._config = tuple(actors), config
        self._counts = _Counts(in_flight=[0] * len(self._actors))

    @classmethod
    def start(cls, config: ClipsConfig) -> ClipPool:
        """Starts the actors; they live until `close`, or until no handle is left."""
        options = DecodeActor.options(num_cpus=config.cpus)  # type: ignore[attr-defined]
        return cls([options.remote(config) for _ in range(config.actors)], config)

    def __reduce__(self) -> tuple[type[ClipPool], tuple[tuple[Any, ...], ClipsConfig]]:
        return (ClipPool, (self._actors, self._config))

    def close(self) -> None:
        """Kills the actors, for every handle."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)

    async def ready(self, deadline_s: float = 120.0) -> None:
        """Returns when every actor answers; `Overdue` names the first that does not."""
        for index, actor in enumerate(self._actors):
            await within(deadline_s, actor.busy_s.remote(), who=_name(index), what="its start")

    async def probe(self, uri: str) -> VideoInfo:
        return await self._ask(uri, f"probe of {uri}", lambda actor: actor.probe.remote(uri))

    async def overview(self, uri: str, request: Overview, size: FrameSize) -> Clip:
        return await self._ask(
            uri, f"overview of {uri}", lambda actor: actor.overview.remote(uri, request, size)
        )

    async def zoom(self, uri: str, request: Zoom, size: FrameSize) -> Clip:
        what = f"zoom of {uri} [{request.start_s:g}, {request.end_s:g}] at {request.fps:g} fps"
        return await self._ask(uri, what, lambda actor: actor.zoom.remote(uri, request, size))

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
        asked = [
            within(_ANSWER_S, actor.stats.remote(), who=_name(index), what="statistics")
            for index, actor in enumerate(self._actors)
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        read = sum((a for a in answers if isinstance(a, ReadStats)), start=ReadStats())
        silent = tuple(_name(i) for i, a in enumerate(answers) if not isinstance(a, ReadStats))
        counts = self._counts
        return PoolStats(read, silent, counts.retried, counts.overdue, counts.lost, counts.killed)

    async def _resolve_one(self, refs: list[FrameRef]) -> list[Frame]:
        uri = refs[0].uri
        what = f"{len(refs)} frames of {uri} by reference"
        return await self._ask(uri, what, lambda actor: actor.resolve.remote(refs))

    async def _ask(self, uri: str, what: str, call: Callable[[Any], Any]) -> Any:
        """Tries the request on one actor after another; bounded by `attempts`."""
        tried: set[int] = set()
        failure: Exception = AssertionError("no attempt was made")
        for attempt in range(self._config.attempts):
            self._counts.retried += attempt > 0
            index = self._route(uri, tried)
            try:
                if index in tried:
                    await self._back(index, what)
                if is_remote(uri):
                    await self._attempt(index, f"fetching {uri}", _fetching(uri), self._config.download_s)
                return await self._attempt(index, what, call, self._config.deadline_s)
            except Overdue as overdue:
                failure = overdue
                self._counts.overdue += 1
                await self._kill_if_stuck(index)
            except (RayActorError, ObjectLostError) as died:
                self._counts.lost += 1
                failure = DecoderLost(
                    f"{uri}: {_name(index)} died during {what} ({type(died).__name__}), "
                    f"attempt {attempt + 1} of {self._config.attempts}",
                    "the video could not be read",
                )
            tried.add(index)
        raise failure

    async def _attempt(self, index: int, what: str, call: Callable[[Any], Any], deadline_s: float) -> Any:
        self._counts.in_flight[index] += 1
        answer = call(self._actors[index])
        try:
            return await within(deadline_s, answer, who=_name(index), what=what)
        except RayTaskError as error:
            if isinstance(error.cause, VideoError):
                raise error.cause from None
            raise
        except (Overdue, asyncio.CancelledError):
            ray.cancel(answer)  # if it still waits in the actor's queue, nobody needs it
            raise
        finally:
            self._counts.in_flight[index] -= 1

    def _route(self, uri: str, tried: set[int]) -> int:
        """The video's own actor (rendezvous hashing), or the idlest where that one is behind."""
        order = sorted(range(len(self._actors)), key=lambda index: _weight(uri, index))
        left = [index for index in order if index not in tried] or order
        load = self._counts.in_flight
        idlest = min(left, key=lambda index: load[index])
        return idlest if load[left[0]] - load[idlest] >= self._config.spill else left[0]

    async def _back(self, index: int, what: str) -> None:
        """Waits until an actor that failed before answers again."""

        async def answers() -> None:
            while True:
                try:
                    await self._actors[index].busy_s.remote()
                    return
                except RayActorError:
                    await asyncio.sleep(_POLL_S)

        await within(self._config.deadline_s, answers(), who=_name(index), what=f"its restart for {what}")

    async def _kill_if_stuck(self, index: int) -> None:
        """Ray restarts what is killed here. An actor that is merely behind is left alone."""
        try:
            busy = await within(
                _ANSWER_S, self._actors[index].busy_s.remote(), who=_name(index), what="a sign of life"
            )
        except RayActorError:
            return  # dead already, so being restarted
        except Overdue:
            busy = float("inf")
        if busy >= self._config.deadline_s:
            self._counts.killed += 1
            ray.kill(self._actors[index], no_restart=False)


def _fetching(uri: str) -> Callable[[Any], Any]:
    return lambda actor: actor.fetch.remote(uri)


def _name(index: int) -> str:
    return f"decode-actor-{index}"


def _weight(uri: str, index: int) -> bytes:
    return hashlib.blake2b(f"{index}/{uri}".encode(), digest_size=8).digest()
