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

from vz_ray.clips.image_text import ImageText, check_image_text
from vz_ray.clips.pool import ClipPool
from vz_ray.config.selector import SelectorConfig
from vz_ray.observe.deadline import within
from vz_ray.observe.errors import UserError
from vz_ray.observe.fingerprint import check_same_code, fingerprint
from vz_ray.video.choice import Features, Search, choose
from vz_ray.video.errors import VideoError

WHO = "the image-text model"
START_S = 600.0
"""A cluster may have to start a machine first."""
_ATTEMPTS = 3
_POLL_S = 0.2
_CHOICES = 100_000
"""Answers kept: a few hundred bytes each."""

T = TypeVar("T")


class RankerLost(RuntimeError):
    """The image-text model's process died at every attempt."""


@dataclass(frozen=True, slots=True)
class RankerStats:
    """What the image-text model has done since its start.

    Attributes:
        asked: Questions.
        repeated: Of these, asked before of the same video.
        videos: Videos looked at, each time that it was.
        images: Images looked at.
    """

    asked: int = 0
    repeated: int = 0
    videos: int = 0
    images: int = 0


@dataclass(frozen=True, slots=True)
class _Seen:
    """A video's candidates: `times_s` [n] and `features` [n, d]."""

    times_s: tuple[float, ...]
    features: Features


@ray.remote(max_restarts=-1, max_task_retries=0)
class RankerActor:
    """The image-text model in a process of its own; it computes in one thread, one batch after another."""

    def __init__(self, driver: Mapping[str, str], settings: Mapping[str, Any], frames: ClipPool) -> None:
        self._refusal: UserError | None = None
        config = SelectorConfig(**settings)
        try:
            check_same_code(driver, WHO, ray.util.get_node_ip_address())
            self._model = ImageText(config.model, device=_device(config), batch=config.batch)
        except UserError as error:
            # Requests raise it: of an error raised here, Ray would tell only that the actor is dead.
            self._refusal = error
        self._frames, self._deadline_s = frames, config.deadline_s
        self._most_bytes = config.cache_mb * 2**20
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="image-text")
        self._seen: OrderedDict[Hashable, _Seen] = OrderedDict()
        self._looking: dict[Hashable, asyncio.Task[_Seen]] = {}
        self._chosen: OrderedDict[Hashable, tuple[float, ...]] = OrderedDict()
        self._asked = self._repeated = self._images = self._videos = 0

    async def ready(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    async def stats(self) -> RankerStats:
        return RankerStats(self._asked, self._repeated, self._videos, self._images)

    async def rank(self, uri: str, question: str, search: Search) -> tuple[float, ...]:
        await self.ready()
        self._asked += 1
        video = (await self._frames.probe(uri)).video_id
        key = (video, question, search)
        if key in self._chosen:
            self._repeated += 1
            self._chosen.move_to_end(key)
            return self._chosen[key]
        seen = await self._look(uri, video, search)
        text = await self._compute(f"the features of {question!r}", lambda: self._model.text(question))
        chosen = choose(seen.features @ text, seen.features, search)
        self._chosen[key] = tuple(seen.times_s[place] for place in chosen)
        while len(self._chosen) > _CHOICES:
            self._chosen.popitem(last=False)
        return self._chosen[key]

    async def _look(self, uri: str, video: str, search: Search) -> _Seen:
        """The candidates' features; whoever asks for those of a video at the same time waits for one look."""
        key = (video, search.grid, search.size)
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

    async def _look_anew(self, uri: str, search: Search) -> _Seen:
        clip = await self._frames.overview(uri, search.grid, search.size)
        # A video slower than the grid shows some frames twice.
        frames = list({frame.pts_s: frame for frame in clip.frames}.values())
        self._videos, self._images = self._videos + 1, self._images + len(frames)
        images = [frame.rgb for frame in frames]
        features = await self._compute(
            f"the features of {len(images)} frames of {uri}", lambda: self._model.images(images)
        )
        return _Seen(tuple(frame.pts_s for frame in frames), features)

    async def _compute(self, what: str, call: Callable[[], T]) -> T:
        future = asyncio.get_running_loop().run_in_executor(self._thread, call)
        return await within(self._deadline_s, future, who=WHO, what=what)


class Ranking:
    """The handle through which episodes ask; a `Ranker`. Give it to Ray actors as it is.

    Raises (every request):
        VideoError: The video cannot be read.
        Overdue: It took longer than `episode.selector.deadline_s`.
        RankerLost: The model's process died at every attempt.
    """

    def __init__(self, actor: Any, deadline_s: float) -> None:
        self._actor, self._deadline_s = actor, deadline_s

    @classmethod
    def start(cls, config: SelectorConfig, frames: ClipPool) -> Ranking:
        """Starts the model's process, which lives until `close`, or until no handle is left.

        Raises:
            UserError: There is no such checkpoint.
        """
        check_image_text(config.model)
        options = RankerActor.options(  # type: ignore[attr-defined]
            num_cpus=config.cpus, num_gpus=config.gpus, max_concurrency=1000
        )
        return cls(options.remote(fingerprint(), asdict(config), frames), config.deadline_s)

    def close(self) -> None:
        """Ends the process, for every handle."""
        ray.kill(self._actor, no_restart=True)

    async def ready(self, deadline_s: float = START_S) -> None:
        """Returns when the model is loaded; `UserError` if it cannot be."""
        await self._ask(deadline_s, "its start", lambda: self._actor.ready.remote())

    async def stats(self) -> RankerStats:
        found: RankerStats = await self._ask(
            self._deadline_s, "statistics", lambda: self._actor.stats.remote()
        )
        return found

    async def rank(self, uri: str, question: str, search: Search) -> tuple[float, ...]:
        what = f"frames of {uri} for {question!r}"
        found: tuple[float, ...] = await self._ask(
            self._deadline_s, what, lambda: self._actor.rank.remote(uri, question, search)
        )
        return found

    async def _ask(self, deadline_s: float, what: str, call: Callable[[], Any]) -> Any:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await within(deadline_s, call(), who=WHO, what=what)
            except RayTaskError as error:
                if isinstance(error.cause, VideoError | UserError):
                    raise error.cause from None
                raise
            except RayActorError as died:
                if attempt == _ATTEMPTS or isinstance(died, ActorDiedError):
                    raise RankerLost(f"{WHO} died {attempt} times during {what}: {died}") from died
                await within(START_S, self._back(), who=WHO, what=f"its restart for {what}")
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


def _device(config: SelectorConfig) -> str:
    """Where the model runs; its threads on CPUs are those that Ray has reserved."""
    import torch

    if config.gpus and torch.cuda.is_available():
        return "cuda"
    torch.set_num_threads(max(1, round(config.cpus)))
    return "cpu"
