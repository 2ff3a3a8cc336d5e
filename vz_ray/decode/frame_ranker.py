"""Frames like a question, found by an image-text model that every episode of the cluster shares.

    the same question to the same video before  -> the frames found then
    the video's candidates looked at before     -> their features; questions of a video share them
    otherwise                                   -> decoded by the pool, looked at in batches

Candidates go from the decoders to the model's process; who asks gets times alone.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
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
from vz_ray.utils.timeouts import with_timeout
from vz_ray.video.errors import VideoError
from vz_ray.video.frame_selection import Features, SelectionParams, select_frames

RANKER_NAME = "the image-text model"
START_TIMEOUT_S = 600.0
"""A cluster may have to start a machine first."""
_ATTEMPTS = 3
_POLL_S = 0.2
_CHOICES = 100_000
"""Answers kept: a few hundred bytes each."""

T = TypeVar("T")


class FrameRankerDiedError(RuntimeError):
    """The image-text model's process died at every attempt."""


@dataclass(frozen=True, slots=True)
class FrameRankerStats:
    """What the image-text model has done since its start.

    Attributes:
        questions: Questions.
        cache_hits: Of these, asked before of the same video.
        embedded_videos: Videos looked at, each time that it was.
        embedded_images: Images looked at.
    """

    questions: int = 0
    cache_hits: int = 0
    embedded_videos: int = 0
    embedded_images: int = 0


@dataclass(frozen=True, slots=True)
class _VideoFeatures:
    """A video's candidates: `times_s` [n] and `features` [n, d]."""

    times_s: tuple[float, ...]
    features: Features


@ray.remote(max_restarts=-1, max_task_retries=0)
class FrameRankerActor:
    """The image-text model in a process of its own; it computes in one thread, one batch after another."""

    def __init__(self, driver: Mapping[str, str], settings: Mapping[str, Any], frames: DecodePool) -> None:
        self._refusal: UserError | None = None
        config = FrameSelectorConfig(**settings)
        try:
            check_same_code(driver, RANKER_NAME, ray.util.get_node_ip_address())
            self._model = ImageTextModel(config.model, device=_device(config), batch_size=config.batch_size)
        except UserError as error:
            # Requests raise it: of an error raised here, Ray would tell only that the actor is dead.
            self._refusal = error
        self._frames, self._deadline_s = frames, config.timeout_s
        self._most_bytes = config.cache_mib * 2**20
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="image-text")
        self._seen: OrderedDict[Hashable, _VideoFeatures] = OrderedDict()
        self._looking: dict[Hashable, asyncio.Task[_VideoFeatures]] = {}
        self._chosen: OrderedDict[Hashable, tuple[float, ...]] = OrderedDict()
        self._asked = self._repeated = self._images = self._videos = 0

    async def ready(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    async def stats(self) -> FrameRankerStats:
        return FrameRankerStats(self._asked, self._repeated, self._videos, self._images)

    async def rank_frames(self, uri: str, question: str, search: SelectionParams) -> tuple[float, ...]:
        await self.ready()
        self._asked += 1
        video = (await self._frames.probe(uri)).video_id
        key = (video, question, search)
        if key in self._chosen:
            self._repeated += 1
            self._chosen.move_to_end(key)
            return self._chosen[key]
        seen = await self._look(uri, video, search)
        text = await self._compute(f"the features of {question!r}", lambda: self._model.encode_text(question))
        chosen = select_frames(seen.features @ text, seen.features, search)
        self._chosen[key] = tuple(seen.times_s[place] for place in chosen)
        while len(self._chosen) > _CHOICES:
            self._chosen.popitem(last=False)
        return self._chosen[key]

    async def _look(self, uri: str, video: str, search: SelectionParams) -> _VideoFeatures:
        """The candidates' features; whoever asks for those of a video at the same time waits for one look."""
        key = (video, search.candidates, search.size)
        if key in self._seen:
            self._seen.move_to_end(key)
            return self._seen[key]
        if key not in self._looking:
            self._looking[key] = asyncio.create_task(self._look_anew(uri, search))
            self._looking[key].add_done_callback(lambda _: self._looking.pop(key, None))
        seen = self._seen[key] = await asyncio.shield(self._looking[key])
        while len(self._seen) > 1 and sum(s.features.nbytes for s in self._seen.values()) > self._most_bytes:
            self._seen.popitem(last=False)
        return seen

    async def _look_anew(self, uri: str, search: SelectionParams) -> _VideoFeatures:
        clip = await self._frames.overview(uri, search.candidates, search.size)
        # A video slower than the grid shows some frames twice.
        frames = list({frame.pts_s: frame for frame in clip.frames}.values())
        self._videos, self._images = self._videos + 1, self._images + len(frames)
        images = [frame.rgb for frame in frames]
        features = await self._compute(
            f"the features of {len(images)} frames of {uri}", lambda: self._model.encode_images(images)
        )
        return _VideoFeatures(tuple(frame.pts_s for frame in frames), features)

    async def _compute(self, what: str, call: Callable[[], T]) -> T:
        future = asyncio.get_running_loop().run_in_executor(self._thread, call)
        return await with_timeout(future, self._deadline_s, target=RANKER_NAME, operation=what)


class FrameRankerHandle:
    """The handle through which episodes ask; a `FrameRanker`. Give it to Ray actors as it is.

    Raises (every request):
        VideoError: The video cannot be read.
        Overdue: It took longer than `timeouts.select_frames_s`.
        RankerLost: The model's process died at every attempt.
    """

    def __init__(self, actor: Any, deadline_s: float) -> None:
        self._actor, self._deadline_s = actor, deadline_s

    @classmethod
    def start(cls, config: FrameSelectorConfig, frames: DecodePool) -> FrameRankerHandle:
        """Starts the model's process, which lives until `close`, or until no handle is left.

        Raises:
            UserError: There is no such checkpoint.
        """
        check_image_text_checkpoint(config.model)
        options = FrameRankerActor.options(  # type: ignore[attr-defined]
            num_cpus=config.num_cpus, num_gpus=config.num_gpus, max_concurrency=1000
        )
        return cls(options.remote(code_fingerprint(), asdict(config), frames), config.timeout_s)

    def close(self) -> None:
        """Ends the process, for every handle."""
        ray.kill(self._actor, no_restart=True)

    async def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Returns when the model is loaded; `UserError` if it cannot be."""
        await self._ask(timeout_s, "its start", lambda: self._actor.ready.remote())

    async def stats(self) -> FrameRankerStats:
        found: FrameRankerStats = await self._ask(
            self._deadline_s, "statistics", lambda: self._actor.stats.remote()
        )
        return found

    async def rank_frames(self, uri: str, question: str, search: SelectionParams) -> tuple[float, ...]:
        what = f"frames of {uri} for {question!r}"
        found: tuple[float, ...] = await self._ask(
            self._deadline_s, what, lambda: self._actor.rank.remote(uri, question, search)
        )
        return found

    async def _ask(self, deadline_s: float, what: str, call: Callable[[], Any]) -> Any:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await with_timeout(call(), deadline_s, target=RANKER_NAME, operation=what)
            except RayTaskError as error:
                if isinstance(error.cause, VideoError | UserError):
                    raise error.cause from None
                raise
            except RayActorError as died:
                if attempt == _ATTEMPTS or isinstance(died, ActorDiedError):
                    raise FrameRankerDiedError(
                        f"{RANKER_NAME} died {attempt} times during {what}: {died}"
                    ) from died
                await with_timeout(
                    self._back(), START_TIMEOUT_S, target=RANKER_NAME, operation=f"its restart for {what}"
                )
        raise AssertionError("unreachable")

    async def _back(self) -> None:
        """Waits until the model's process, which Ray starts again, answers."""
        while True:
            try:
                await self._actor.ready.remote()
                return
            except ActorDiedError:
                raise  # it was ended on purpose
            except RayActorError:
                await asyncio.sleep(_POLL_S)


def _device(config: FrameSelectorConfig) -> str:
    """Where the model runs; its threads on CPUs are those that Ray has reserved."""
    import torch

    if config.num_gpus and torch.cuda.is_available():
        return "cuda"
    torch.set_num_threads(max(1, round(config.num_cpus)))
    return "cpu"
