"""Client of the decode pool.

identical request in flight  -> share its result
quarantine, admission queue  -> bound the bytes in flight, with round robin between owners
router                       -> the decoder that has the video open, or the least loaded one
retry policy                 -> attempts with timeouts; see `retry.py` and `quarantine.py`
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import ray
from ray.exceptions import RayTaskError

from vz_ray.config.clips import ClipsConfig
from vz_ray.decode.admission import ByteLimiter
from vz_ray.decode.autoscaler import DecodeAutoscaler
from vz_ray.decode.decoder import start_decoder
from vz_ray.decode.retry import DecodeRequest, RetryPolicy, get_status
from vz_ray.decode.router import DecoderRouter, decoder_name
from vz_ray.decode.stats import DecodeClientStats, DecodePoolStats
from vz_ray.monitoring.log_context import RunIdentity
from vz_ray.utils.code_fingerprint import code_fingerprint
from vz_ray.utils.timeouts import with_timeout
from vz_ray.video.clip_reader import DECODER_BACKENDS, ReaderStats
from vz_ray.video.frame import (
    Clip,
    ClipRequest,
    Frame,
    FrameRef,
    FrameSize,
    VideoInfo,
    ZoomRequest,
    describe_clip,
)


@dataclass(slots=True)
class _InFlightRequest:
    """A running request and the number of callers that wait for it."""

    task: asyncio.Task[Any]
    waiting: int = 0


class _LoopState:
    """State bound to one event loop. A client may be used in several loops, one after another."""

    def __init__(self, loop: asyncio.AbstractEventLoop, config: ClipsConfig) -> None:
        self.loop = loop
        self.limiter = ByteLimiter(config.max_in_flight_mib * 2**20, config.queue_timeout_s)
        self.suspect_lock = asyncio.Lock()
        self.in_flight: dict[Hashable, _InFlightRequest] = {}


class DecodePool:
    """Frames from a pool of decoder actors; implements `FrameSource`.

    Pass the client itself to Ray actors that need frames. A pickled copy uses the same decoders
    and keeps its own load, counters and quarantine.

    Raises (every request):
        VideoError: The video cannot be read; `DecoderDiedError` if decoders died at every attempt,
            `VideoQuarantinedError` if the video is quarantined.
        UserError: Ray restarted a decoder on a node with another version of the code.
        StepTimeout: The last attempt timed out; names the decoder and the request.
    """

    def __init__(self, router: DecoderRouter, config: ClipsConfig, autoscaler: Any | None = None) -> None:
        self._router, self._config, self._autoscaler = router, config, autoscaler
        self._retry = RetryPolicy(router, config)
        self._loop_state: _LoopState | None = None

    @classmethod
    def start(cls, config: ClipsConfig, run_identity: RunIdentity = RunIdentity()) -> DecodePool:  # noqa: B008 - frozen
        """Start the decoders. They live until `close`, or until the last client is deleted.

        Raises:
            UserError: `config.decoder` cannot be loaded.
        """
        DECODER_BACKENDS[config.decoder]()
        driver = code_fingerprint()
        actors = {
            slot: start_decoder(decoder_name(slot), driver, config, run_identity) for slot in range(config.num_actors)
        }
        autoscaler = None
        if config.actor_limit > config.num_actors:
            autoscaler = DecodeAutoscaler.remote(driver, config, actors, run_identity)  # type: ignore[attr-defined]
        return cls(DecoderRouter(actors, actors, autoscaler, config.max_load_imbalance), config, autoscaler)

    def __reduce__(self) -> tuple[type[DecodePool], tuple[DecoderRouter, ClipsConfig, Any | None]]:
        return (DecodePool, (self._router, self._config, self._autoscaler))

    def close(self) -> None:
        """Kill the decoders, for every client."""
        if self._autoscaler is not None:
            ray.kill(self._autoscaler, no_restart=True)  # its own decoders die with it
        for actor in self._router.actors.values():
            ray.kill(actor, no_restart=True)

    async def wait_until_ready(self, timeout_s: float = 120.0) -> None:
        """Wait until every decoder responds.

        Raises:
            UserError: A decoder is on a node with another version of the code.
            StepTimeout: A decoder did not respond.
        """
        for slot, actor in self._router.actors.items():
            try:
                await with_timeout(actor.busy_s.remote(), timeout_s, target=decoder_name(slot), operation="its start")
            except RayTaskError as error:
                raise error.cause from error

    async def probe(self, uri: str) -> VideoInfo:
        request = DecodeRequest(uri, f"probe of {uri}", 0, lambda actor: actor.probe.remote(uri))
        info: VideoInfo = await self._coalesce(("probe", uri), request)
        return info

    async def clip(self, uri: str, request: ClipRequest, size: FrameSize) -> Clip:
        decode_request = DecodeRequest(
            uri,
            describe_clip(uri, request),
            self._max_bytes(request, size),
            lambda actor: actor.clip.remote(uri, request, size),
        )
        clip: Clip = await self._coalesce((uri, request, size), decode_request)
        return clip

    async def resolve(self, refs: Sequence[FrameRef]) -> list[Frame]:
        batches: dict[str, list[FrameRef]] = {}
        for ref in dict.fromkeys(refs):
            batches.setdefault(ref.uri, []).append(ref)
        results = await asyncio.gather(*(self._resolve_batch(batch) for batch in batches.values()))
        frames = dict(zip(chain(*batches.values()), chain(*results), strict=True))
        return [frames[ref] for ref in refs]

    async def stats(self) -> DecodePoolStats:
        """Collect the counters of all decoders; decoders that do not reply are listed."""
        actors = dict(self._router.actors)
        requests = [get_status(slot, actor.stats.remote(), "statistics") for slot, actor in actors.items()]
        results = await asyncio.gather(*requests, return_exceptions=True)
        stats_by_slot = dict(zip(actors, results, strict=True))
        return DecodePoolStats(
            reader=sum((stats for stats in results if isinstance(stats, ReaderStats)), start=ReaderStats()),
            unresponsive=tuple(
                decoder_name(slot) for slot, stats in stats_by_slot.items() if not isinstance(stats, ReaderStats)
            ),
            num_decoders=len(actors),
            peak_in_flight_bytes=self._current_loop_state().limiter.peak_bytes,
        )

    def client_stats(self) -> DecodeClientStats:
        """Return the state and counters of this client, without remote calls."""
        return DecodeClientStats(
            in_flight=self._router.in_flight.total(),
            waiting=self._loop_state.limiter.waiting if self._loop_state is not None else 0,
            quarantined=len(self._retry.quarantine.reasons),
            **asdict(self._retry.counters),
        )

    async def _resolve_batch(self, refs: list[FrameRef]) -> list[Frame]:
        """Resolve references to frames of one video."""
        uri = refs[0].uri
        request = DecodeRequest(
            uri,
            f"{len(refs)} frames of {uri} by reference",
            sum(ref.width * ref.height * 3 for ref in refs),
            lambda actor: actor.resolve.remote(refs),
        )
        frames: list[Frame] = await self._coalesce(tuple(refs), request)
        return frames

    def _current_loop_state(self) -> _LoopState:
        loop = asyncio.get_running_loop()
        if self._loop_state is None or self._loop_state.loop is not loop:
            self._loop_state = _LoopState(loop, self._config)
            self._router.reset_load()
        return self._loop_state

    def _max_bytes(self, request: ClipRequest, size: FrameSize) -> int:
        """Upper bound on the bytes of a clip; the decoder rejects more than `max_request_frames`."""
        try:
            num_frames = request.num_frames if isinstance(request, ZoomRequest) else request.max_frames
        except (ValueError, OverflowError):  # not finite; the decoder rejects it
            num_frames = 0
        return max(0, min(num_frames, self._config.max_request_frames)) * size.max_pixels * 3

    async def _coalesce(self, key: Hashable, request: DecodeRequest) -> Any:
        """Share the result of identical in-flight requests.

        Cancelling one caller does not cancel the request; cancelling the last one does.
        """
        state = self._current_loop_state()
        in_flight = state.in_flight.get(key)
        if in_flight is None:
            in_flight = _InFlightRequest(asyncio.create_task(self._admit(state, request)))
            state.in_flight[key] = in_flight
            in_flight.task.add_done_callback(lambda _: state.in_flight.pop(key, None))
        in_flight.waiting += 1
        try:
            return await asyncio.shield(in_flight.task)
        finally:
            in_flight.waiting -= 1
            if not in_flight.waiting and not in_flight.task.done():
                state.in_flight.pop(key, None)
                in_flight.task.cancel()

    async def _admit(self, state: _LoopState, request: DecodeRequest) -> Any:
        """Run the request when its bytes fit under the limit."""
        self._retry.quarantine.check(request.uri)
        await self._router.refresh()
        async with state.limiter.reserve(request.num_bytes, request.operation):
            return await self._retry.run(request, state.suspect_lock)
