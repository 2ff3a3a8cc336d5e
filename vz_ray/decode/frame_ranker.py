"""Frame ranker: an image-text model in one Ray actor, shared by all episodes.

    question and video ranked before  -> cached times
    features of the video cached      -> rank them for the new question
    otherwise                         -> decode the candidates in the pool, encode them in batches

Frames go from the decoders to the actor. Callers receive times only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from vz_ray.config.frame_selector import FrameSelectorConfig
from vz_ray.decode.image_text_model import ImageTextModel, check_image_text_checkpoint
from vz_ray.decode.pool import DecodePool
from vz_ray.utils.code_fingerprint import check_same_code, code_fingerprint
from vz_ray.utils.errors import UserError
from vz_ray.utils.lru_cache import LruCache
from vz_ray.utils.timeouts import with_timeout
from vz_ray.video.errors import VideoError
from vz_ray.video.frame_selection import Features, SelectionParams, select_frames

RANKER_NAME = "the image-text model"
START_TIMEOUT_S = 600.0
"""Timeout of the actor's start; the cluster may have to start a node first."""
_MAX_ATTEMPTS = 3
_POLL_S = 0.2
_MAX_CACHED_RESULTS = 100_000
"""Maximum number of cached results, a few hundred bytes each."""

T = TypeVar("T")


class FrameRankerDiedError(RuntimeError):
    """The actor died at every attempt."""


@dataclass(frozen=True, slots=True)
class _VideoFeatures:
    """Candidate frames of a video: `times_s` [n] and `features` [n, d]."""

    times_s: tuple[float, ...]
    features: Features


@ray.remote(max_restarts=-1, max_task_retries=0)
class FrameRankerActor:
    """Image-text model in its own process. One thread computes, one batch at a time."""

    def __init__(self, driver: Mapping[str, str], settings: Mapping[str, Any], frames: DecodePool) -> None:
        self._start_error: UserError | None = None
        config = FrameSelectorConfig(**settings)
        try:
            check_same_code(driver, RANKER_NAME, ray.util.get_node_ip_address())
            self._model = ImageTextModel(config.model, device=_device(config), batch_size=config.batch_size)
        except UserError as error:
            # Requests raise it. If it were raised here, Ray would only report a dead actor.
            self._start_error = error
        self._frames, self._timeout_s = frames, config.timeout_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="image-text")
        self._features = LruCache[Hashable, _VideoFeatures](
            config.cache_mib * 2**20, lambda video: video.features.nbytes
        )
        self._embedding: dict[Hashable, asyncio.Task[_VideoFeatures]] = {}
        self._results = LruCache[Hashable, tuple[float, ...]](_MAX_CACHED_RESULTS, lambda _: 1)

    async def ready(self) -> None:
        if self._start_error is not None:
            raise self._start_error

    async def rank_frames(self, uri: str, question: str, params: SelectionParams) -> tuple[float, ...]:
        await self.ready()
        video_id = (await self._frames.probe(uri)).video_id
        key = (video_id, question, params)
        if (cached := self._results.get(key)) is not None:
            return cached
        video = await self._video_features(uri, video_id, params)
        text = await self._compute(f"the features of {question!r}", lambda: self._model.encode_text(question))
        indices = select_frames(video.features @ text, video.features, params)
        times_s = tuple(video.times_s[index] for index in indices)
        self._results.add(key, times_s)
        return times_s

    async def _video_features(self, uri: str, video_id: str, params: SelectionParams) -> _VideoFeatures:
        """Return the candidates' features; concurrent requests for a video share one computation."""
        key = (video_id, params.candidates, params.size)
        if (cached := self._features.get(key)) is not None:
            return cached
        if key not in self._embedding:
            self._embedding[key] = asyncio.create_task(self._embed_video(uri, params))
            self._embedding[key].add_done_callback(lambda _: self._embedding.pop(key, None))
        video = await asyncio.shield(self._embedding[key])
        self._features.add(key, video)
        return video

    async def _embed_video(self, uri: str, params: SelectionParams) -> _VideoFeatures:
        clip = await self._frames.clip(uri, params.candidates, params.size)
        # If the video's frame rate is below the candidates' rate, the clip repeats frames.
        frames = list({frame.pts_s: frame for frame in clip.frames}.values())
        images = [frame.rgb for frame in frames]
        features = await self._compute(
            f"the features of {len(images)} frames of {uri}", lambda: self._model.encode_images(images)
        )
        return _VideoFeatures(tuple(frame.pts_s for frame in frames), features)

    async def _compute(self, operation: str, call: Callable[[], T]) -> T:
        future = asyncio.get_running_loop().run_in_executor(self._thread, call)
        return await with_timeout(future, self._timeout_s, target=RANKER_NAME, operation=operation)


class FrameRankerHandle:
    """Client of the frame ranker actor; implements `FrameRanker`. It can be passed to Ray actors.

    Raises (every request):
        VideoError: The video cannot be read.
        StepTimeout: The request exceeded `timeouts.select_frames_s`.
        FrameRankerDiedError: The actor died at every attempt.
    """

    def __init__(self, actor: Any, timeout_s: float) -> None:
        self._actor, self._timeout_s = actor, timeout_s

    @classmethod
    def start(cls, config: FrameSelectorConfig, frames: DecodePool) -> FrameRankerHandle:
        """Start the actor. It lives until `close`, or until the last handle is deleted.

        Raises:
            UserError: `config.model` is not a checkpoint.
        """
        check_image_text_checkpoint(config.model)
        options = FrameRankerActor.options(  # type: ignore[attr-defined]
            num_cpus=config.num_cpus, num_gpus=config.num_gpus, max_concurrency=1000
        )
        return cls(options.remote(code_fingerprint(), asdict(config), frames), config.timeout_s)

    def close(self) -> None:
        """Kill the actor, for every handle."""
        ray.kill(self._actor, no_restart=True)

    async def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until the model is loaded.

        Raises:
            UserError: The model cannot be loaded.
        """
        await self._call(timeout_s, "its start", lambda: self._actor.ready.remote())

    async def rank_frames(self, uri: str, question: str, params: SelectionParams) -> tuple[float, ...]:
        times_s: tuple[float, ...] = await self._call(
            self._timeout_s,
            f"frames of {uri} for {question!r}",
            lambda: self._actor.rank_frames.remote(uri, question, params),
        )
        return times_s

    async def _call(self, timeout_s: float, operation: str, submit: Callable[[], Any]) -> Any:
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            try:
                return await with_timeout(submit(), timeout_s, target=RANKER_NAME, operation=operation)
            except RayTaskError as error:
                if isinstance(error.cause, VideoError | UserError):
                    raise error.cause from None
                raise
            except RayActorError as error:
                if attempt == _MAX_ATTEMPTS or isinstance(error, ActorDiedError):
                    raise FrameRankerDiedError(
                        f"{RANKER_NAME} died during {operation}, attempt {attempt} of {_MAX_ATTEMPTS}: {error}"
                    ) from error
                await with_timeout(
                    self._wait_for_restart(),
                    START_TIMEOUT_S,
                    target=RANKER_NAME,
                    operation=f"its restart before {operation}",
                )
        raise AssertionError("unreachable")

    async def _wait_for_restart(self) -> None:
        """Wait until the actor, which Ray restarts, responds."""
        while True:
            try:
                await self._actor.ready.remote()
                return
            except ActorDiedError:
                raise  # killed by `close`
            except RayActorError:
                await asyncio.sleep(_POLL_S)


def _device(config: FrameSelectorConfig) -> str:
    """Return the torch device; on CPU, use as many threads as Ray reserved CPUs."""
    import torch

    if config.num_gpus and torch.cuda.is_available():
        return "cuda"
    torch.set_num_threads(max(1, round(config.num_cpus)))
    return "cpu"
