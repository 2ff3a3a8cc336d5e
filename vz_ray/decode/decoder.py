"""Decoder actor: a clip reader in its own process, restarted by Ray."""

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
from vz_ray.video.errors import UnexpectedReadError, VideoError
from vz_ray.video.frame import Clip, ClipRequest, Frame, FrameRef, FrameSize, VideoInfo, ZoomRequest

T = TypeVar("T")

log = logging.getLogger(__name__)

_IDLE_POLL_S = 0.2
_MEMORY_EXIT_CODE = 3
"""Exit code of a decoder above its memory limit."""


@ray.remote(max_restarts=-1, max_task_retries=0, concurrency_groups={"status": 1, "download": 4})
class DecoderActor:
    """Serves requests sequentially, in FIFO order; `status` and `download` methods run concurrently.

    Because of the order, only the first sample of a task decodes, and the others are cache hits.
    Ray does not retry lost requests: the client retries them on another decoder.
    """

    def __init__(
        self, name: str, driver: Mapping[str, str], settings: Mapping[str, Any], run_identity: RunIdentity
    ) -> None:
        logging_config.configure_actor_logging(name, run_identity)
        self._metrics = RayMetrics(run_identity.run)
        self._stopping = False
        self._busy_since: float | None = None
        self._stats = ReaderStats()
        self._start_error: UserError | None = None
        try:
            check_same_code(driver, name, ray.util.get_node_ip_address())
        except UserError as error:
            # Requests raise it. If it were raised here, Ray would only report a dead actor.
            self._start_error = error
            return
        config = ClipsConfig(**settings)
        self._reader, self._locator = build_reader(config), build_locator(config)
        self._max_rss, self._process = config.max_rss_mib * 2**20, psutil.Process()

    def probe(self, uri: str) -> VideoInfo:
        return self._serve("probe", lambda: self._reader.probe(uri))

    def clip(self, uri: str, request: ClipRequest, size: FrameSize) -> Clip:
        kind = "zoom" if isinstance(request, ZoomRequest) else "overview"
        return self._serve(kind, lambda: self._reader.clip(uri, request, size))

    def resolve(self, refs: Sequence[FrameRef]) -> list[Frame]:
        return self._serve("resolve", lambda: self._reader.resolve(refs))

    @ray.method(concurrency_group="download")
    def download(self, uri: str) -> None:
        """Download a URL to the cache of this machine, concurrently with other requests."""
        self._raise_start_error()
        self._locator.locate(uri)

    @ray.method(concurrency_group="status")
    def busy_s(self) -> float:
        """Return the run time of the current request, seconds; 0 if idle."""
        self._raise_start_error()
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @ray.method(concurrency_group="status")
    def stacks(self) -> str:
        """Return the stacks of all threads."""
        return format_stacks()

    @ray.method(concurrency_group="status")
    def stats(self) -> ReaderStats:
        """Return the counters after the last completed request."""
        return self._stats

    def _raise_start_error(self) -> None:
        if self._start_error is not None:
            raise self._start_error

    def _serve(self, kind: str, call: Callable[[], T]) -> T:
        self._raise_start_error()
        self._busy_since = start = time.monotonic()
        try:
            return call()
        except VideoError:
            raise
        except Exception as error:
            log.exception("Unhandled exception in a %s request", kind)
            raise UnexpectedReadError(f"reading failed with {type(error).__name__}: {error}") from error
        finally:
            self._busy_since, self._stats = None, self._reader.stats()
            self._metrics.observe("vz_decode_seconds", time.monotonic() - start, kind=kind)
            if not self._stopping and self._process.memory_info().rss > self._max_rss:
                self._stopping = True
                threading.Thread(target=self._exit_when_idle, daemon=True).start()

    def _exit_when_idle(self) -> None:
        """Exit the process when idle; the client retries a request that arrives meanwhile."""
        log.warning("Restarting decoder: memory is above clips.max_rss_mib (%d)", self._max_rss // 2**20)
        time.sleep(_IDLE_POLL_S)
        while self._busy_since is not None:
            time.sleep(_IDLE_POLL_S)
        os._exit(_MEMORY_EXIT_CODE)


def start_decoder(name: str, driver: Mapping[str, str], config: ClipsConfig, run_identity: RunIdentity) -> Any:
    """Start a decoder and return its actor handle; Ray schedules it on a node with free CPUs.

    `driver` is the driver's code fingerprint. On a node with another version of the code, every request
    raises `UserError`.
    """
    options = DecoderActor.options(  # type: ignore[attr-defined]
        num_cpus=config.cpus_per_actor, resources=node_group_resources(config.node_group)
    )
    return options.remote(name, dict(driver), asdict(config), run_identity)
