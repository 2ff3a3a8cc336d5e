"""Who chooses the overview's frames: the clock, an index file, an image-text model, a function of the user's.

Whoever chooses, what comes out is a request that a frame source answers with an
ordinary clip, so episodes go on alike. A request holds rates, times or frame
numbers, never the question: samples of a task, and questions that choose alike,
share its answer.

A function of the user's own, `episode.selector.kind: package.module:name`:

    def select(video: VideoInfo, question: str, most: int) -> Sequence[float]

returns the seconds of the frames to show: ascending, each once, from 0 to
`video.duration_s`, at least one and at most `most`. It is called once for each
episode, in a thread of a rollout worker, and must give the same for the same
question.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from vz_ray.config.selector import SelectorConfig
from vz_ray.data.task import Task
from vz_ray.episode.protocols import Ranker
from vz_ray.episode.tspo import read_index
from vz_ray.observe.deadline import within
from vz_ray.observe.dotted import load_function
from vz_ray.observe.errors import UserError
from vz_ray.video.choice import Search
from vz_ray.video.frame import Chosen, FrameSize, Overview, VideoInfo
from vz_ray.video.overview import thinned

_OPTION = re.compile(r"\s\(?A[.):]\s")


@dataclass(frozen=True, slots=True)
class Selection:
    """What an overview is to show.

    Attributes:
        request: For the frame source.
        fell_back: The selector had nothing for this question, and uniform frames were taken.
    """

    request: Overview | Chosen
    fell_back: bool = False


class Selector(Protocol):
    """Chooses the overview's frames of one episode; `uniform` is what the episode's own limits ask for."""

    async def select(self, task: Task, video: VideoInfo, uniform: Overview) -> Selection: ...


def selector_of(config: SelectorConfig, ranker: Ranker | None = None) -> Selector:
    """The selector that `config` names; cheap to call, what is read from files is kept.

    Args:
        config: Which.
        ranker: The image-text model, for `query`.

    Raises:
        UserError: Its file or function is not there, or there is no image-text model.
    """
    match config.kind:
        case "uniform":
            return _Clock(lambda uniform: uniform)
        case "count":
            return _Clock(lambda uniform: replace(uniform, fps=math.inf))
        case "keyframes":
            return _Clock(lambda uniform: replace(uniform, keyframes=True))
        case "tspo":
            read_index(config.index)
            return _Tspo(config)
        case "query":
            if ranker is None:
                raise UserError(
                    "episode.selector.kind is query, and this command starts no image-text model; "
                    "use another kind here"
                )
            return _Query(config, ranker)
    function = load_function("episode.selector.kind", config.kind, ("video", "question", "most"))
    return _Own(config, function)


def check_times(times: Any, video: VideoInfo, most: int, who: str) -> tuple[float, ...]:
    """The seconds that a selector returned.

    Raises:
        UserError: They break the contract; the message names selector, video and value.
    """

    def wrong(what: str) -> UserError:
        return UserError(f"{who} on {video.uri}: {what}")

    try:
        seconds = [float(time) for time in times]
    except (TypeError, ValueError) as error:
        raise wrong(f"returned {times!r}; it must return a sequence of seconds") from error
    if not seconds:
        raise wrong("returned no frame; it must return at least one")
    if len(seconds) > most:
        raise wrong(f"returned {len(seconds)} frames; at most {most} can be shown")
    for before, time in zip([-math.inf, *seconds], seconds, strict=False):
        if not math.isfinite(time):
            raise wrong(f"returned {time}, which is not finite")
        if not 0 <= time <= video.duration_s:
            raise wrong(f"returned {time:g} s; the video is from 0 to {video.duration_s:g} s")
        if time == before:
            raise wrong(f"returned {time:g} s twice")
        if time < before:
            raise wrong(f"returned {time:g} s after {before:g} s; times must ascend")
    return tuple(seconds)


def question_alone(text: str) -> str:
    """A question without its options, which would be most of what an image-text model reads.

    Example:
        question_alone("What flashes? A. disc B. ring") == "What flashes?"
    """
    return _OPTION.split(f"{text} ", maxsplit=1)[0].strip() or text


@dataclass(frozen=True, slots=True)
class _Clock:
    """Without a look at the question."""

    request: Callable[[Overview], Overview]

    async def select(self, task: Task, video: VideoInfo, uniform: Overview) -> Selection:
        return Selection(self.request(uniform))


@dataclass(frozen=True, slots=True)
class _Tspo:
    config: SelectorConfig

    async def select(self, task: Task, video: VideoInfo, uniform: Overview) -> Selection:
        frames = read_index(self.config.index).frames_of(task)
        if frames is not None:
            shown = (frames[i] for i in thinned(len(frames), uniform.max_frames))
            return Selection(Chosen(numbers=tuple(shown)))
        if self.config.missing == "uniform":
            return Selection(uniform, fell_back=True)
        raise UserError(
            f"the TSPO index {self.config.index} has no record of task {task.task_id!r} on {task.video}; "
            "set episode.selector.missing=uniform to show it uniform frames, counted as such"
        )


@dataclass(frozen=True, slots=True)
class _Query:
    config: SelectorConfig
    ranker: Ranker

    async def select(self, task: Task, video: VideoInfo, uniform: Overview) -> Selection:
        config = self.config
        pixels = config.candidate_pixels
        search = Search(
            Overview(config.candidate_fps, config.candidates),
            FrameSize(min(FrameSize().min_pixels, pixels), pixels),
            uniform.max_frames,
            config.segments,
            config.diversity,
        )
        times = await self.ranker.rank(task.video, question_alone(task.question), search)
        who = f"episode.selector.kind query with {config.model}"
        return Selection(Chosen(check_times(times, video, uniform.max_frames, who)))


@dataclass(frozen=True, slots=True)
class _Own:
    config: SelectorConfig
    function: Callable[[VideoInfo, str, int], Sequence[float]]

    async def select(self, task: Task, video: VideoInfo, uniform: Overview) -> Selection:
        who = f"episode.selector.kind {self.config.kind!r}"
        call = asyncio.to_thread(self._call, who, video, task.question, uniform.max_frames)
        times = await within(self.config.deadline_s, call, who=who, what=f"the overview of {video.uri}")
        return Selection(Chosen(check_times(times, video, uniform.max_frames, who)))

    def _call(self, who: str, video: VideoInfo, question: str, most: int) -> Sequence[float]:
        try:
            return self.function(video, question, most)
        except Exception as error:
            raise UserError(f"{who} on {video.uri} raised {type(error).__name__}: {error}") from error
