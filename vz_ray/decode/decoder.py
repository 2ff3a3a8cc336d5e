"""A decode process: a clip reader that Ray can restart."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import psutil
import ray

from vz_ray.config.clips import ClipsConfig
from vz_ray.decode.reader_factory import build_locator, build_reader
from vz_ray.monitoring import logging_config
from vz_ray.monitoring.log_context import RunIdentity
from vz_ray.monitoring.ray_metrics import RayMetrics
from vz_ray.utils.code_fingerprint import check_same_code
from vz_ray.utils.errors import UserError
from vz_ray.utils.placement import node_group_resources
from vz_ray.utils.stack_dump import format_stacks
from vz_ray.video.clip_reader import ReaderStats
from vz_ray.video.errors import UnexpectedReadError
from vz_ray.video.frame import (
    Clip,
    Frame,
    FrameRef,
    FrameSize,
    ImageRequest,
    OverviewRequest,
    SelectedFramesRequest,
    VideoError,
    VideoInfo,
    ZoomRequest,
)

T = TypeVar("T")

log = logging.getLogger(__name__)

_IDLE_POLL_S = 0.2
_GROWN = 3
"""Exit status of an actor that has grown too large."""


@ray.remote(max_restarts=-1, max_task_retries=0, concurrency_groups={"watch": 1, "fetch": 4})
class DecoderActor:
    """Serves requests one by one, in the order they came; `watch` methods answer meanwhile.

    One by one, so that of the samples of a task only the first decodes and the
    others find its frames. Lost requests are not repeated by Ray: the pool
    tries them elsewhere.
    """

    def __init__(
        self, who: str, driver: Mapping[str, str], settings: Mapping[str, Any], badge: RunIdentity
    ) -> None:
        logging_config.configure_actor_logging(who, badge)
        self._meters = RayMetrics(badge.run)
        self._leaving = False
        self._busy_since: float | None = None
        self._stats = ReaderStats()
        self._refusal: UserError | None = None
        try:
            check_same_code(driver, who, ray.util.get_node_ip_address())
        except UserError as error:
            # Requests raise it: of an error raised here, Ray would tell only that the actor is dead.
            self._refusal = error
            return
        config = ClipsConfig(**settings)
        self._reader, self._sources = build_reader(config), build_locator(config)
        self._max_rss, self._process = config.max_rss_mib * 2**20, psutil.Process()

    def probe(self, uri: str) -> VideoInfo:
        return self._serve("probe", lambda: self._reader.probe(uri))

    def overview(
        self, uri: str, request: OverviewRequest | SelectedFramesRequest | ImageRequest, size: FrameSize
    ) -> Clip:
        return self._serve("overview", lambda: self._reader.overview(uri, request, size))

    def zoom(self, uri: str, request: ZoomRequest, size: FrameSize) -> Clip:
        return self._serve("zoom", lambda: self._reader.zoom(uri, request, size))

    def resolve(self, refs: Sequence[FrameRef]) -> list[Frame]:
        return self._serve("resolve", lambda: self._reader.resolve(refs))

    @ray.method(concurrency_group="fetch")
    def fetch(self, uri: str) -> None:
        """Brings what is at a URL to this machine, beside the requests that are served meanwhile."""
        self._check_refusal()
        self._sources.locate(uri)

    @ray.method(concurrency_group="watch")
    def busy_s(self) -> float:
        """Seconds that the request in progress has run; 0 when idle."""
        self._check_refusal()
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @ray.method(concurrency_group="watch")
    def stacks(self) -> str:
        """Where its threads are."""
        return format_stacks()

    @ray.method(concurrency_group="watch")
    def stats(self) -> ReaderStats:
        """As of the last request that was served."""
        return self._stats

    def _check_refusal(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    def _serve(self, kind: str, call: Callable[[], T]) -> T:
        self._check_refusal()
        self._busy_since = began = time.monotonic()
        try:
            return call()
        except VideoError:
            raise
        except Exception as error:
            log.exception("a request failed in a way that nobody foresaw")
            raise UnexpectedReadError(
                f"reading failed with {type(error).__name__}: {error}", "the video could not be read"
            ) from error
        finally:
            self._busy_since, self._stats = None, self._reader.stats()
            self._meters.observe("vz_decode_seconds", time.monotonic() - began, kind=kind)
            if not self._leaving and self._process.memory_info().rss > self._max_rss:
                self._leaving = True
                threading.Thread(target=self._leave, daemon=True).start()

    def _leave(self) -> None:
        """Ends the process once no request is in progress; one that comes just then is tried elsewhere."""
        log.warning("memory is above clips.max_rss_mib (%d): starting anew", self._max_rss // 2**20)
        time.sleep(_IDLE_POLL_S)
        while self._busy_since is not None:
            time.sleep(_IDLE_POLL_S)
        os._exit(_GROWN)


def start_decoder(who: str, driver: Mapping[str, str], config: ClipsConfig, badge: RunIdentity) -> Any:
    """A handle to a new actor, which Ray starts where `config.cpus` are free.

    On a node of another version than `driver`, its fingerprint, every request raises `UserError`.
    """
    options = DecoderActor.options(  # type: ignore[attr-defined]
        num_cpus=config.cpus_per_actor, resources=node_group_resources(config.node_group)
    )
    return options.remote(who, dict(driver), asdict(config), badge)
