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

from vz_ray.config.frame_selector import FrameSelectorConfig
from vz_ray.env.protocols import FrameRanker
from vz_ray.env.task import Task
from vz_ray.env.tspo_index import load_tspo_index
from vz_ray.utils.errors import UserError
from vz_ray.utils.function_loader import load_function
from vz_ray.utils.timeouts import with_timeout
from vz_ray.video.frame import FrameSize, OverviewRequest, SelectedFramesRequest, VideoInfo
from vz_ray.video.frame_selection import SelectionParams
from vz_ray.video.overview import spread_indices

_OPTION = re.compile(r"\s\(?A[.):]\s")


@dataclass(frozen=True, slots=True)
class FrameSelection:
    """What an overview is to show.

    Attributes:
        request: For the frame source.
        used_fallback: The selector had nothing for this question, and uniform frames were taken.
    """

    request: OverviewRequest | SelectedFramesRequest
    used_fallback: bool = False


class FrameSelector(Protocol):
    """Chooses the overview's frames of one episode; `uniform` is what the episode's own limits ask for."""

    async def select(self, task: Task, video: VideoInfo, uniform: OverviewRequest) -> FrameSelection: ...


def create_frame_selector(config: FrameSelectorConfig, ranker: FrameRanker | None = None) -> FrameSelector:
    """The selector that `config` names; cheap to call, what is read from files is kept.

    Args:
        config: Which.
        ranker: The image-text model, for `query`.

    Raises:
        UserError: Its file or function is not there, or there is no image-text model.
    """
    match config.kind:
        case "uniform":
            return UniformSelector(lambda uniform: uniform)
        case "count":
            return UniformSelector(lambda uniform: replace(uniform, fps=math.inf))
        case "keyframes":
            return UniformSelector(lambda uniform: replace(uniform, keyframes=True))
        case "tspo":
            load_tspo_index(config.index_file)
            return TspoSelector(config)
        case "query":
            if ranker is None:
                raise UserError(
                    "episode.selector.kind is query, and this command starts no image-text model; "
                    "use another kind here"
                )
            return QuerySelector(config, ranker)
    function = load_function("episode.selector.kind", config.kind, ("video", "question", "most"))
    return FunctionSelector(config, function)


def validate_times(times: Any, video: VideoInfo, max_frames: int, selector_name: str) -> tuple[float, ...]:
    """The seconds that a selector returned.

    Raises:
        UserError: They break the contract; the message names selector, video and value.
    """

    def wrong(what: str) -> UserError:
        return UserError(f"{selector_name} on {video.uri}: {what}")

    try:
        seconds = [float(time) for time in times]
    except (TypeError, ValueError) as error:
        raise wrong(f"returned {times!r}; it must return a sequence of seconds") from error
    if not seconds:
        raise wrong("returned no frame; it must return at least one")
    if len(seconds) > max_frames:
        raise wrong(f"returned {len(seconds)} frames; at most {max_frames} can be shown")
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


def strip_options(text: str) -> str:
    """A question without its options, which would be most of what an image-text model reads.

    Example:
        question_alone("What flashes? A. disc B. ring") == "What flashes?"
    """
    return _OPTION.split(f"{text} ", maxsplit=1)[0].strip() or text


@dataclass(frozen=True, slots=True)
class UniformSelector:
    """Without a look at the question."""

    request: Callable[[OverviewRequest], OverviewRequest]

    async def select(self, task: Task, video: VideoInfo, uniform: OverviewRequest) -> FrameSelection:
        return FrameSelection(self.request(uniform))


@dataclass(frozen=True, slots=True)
class TspoSelector:
    config: FrameSelectorConfig

    async def select(self, task: Task, video: VideoInfo, uniform: OverviewRequest) -> FrameSelection:
        frames = load_tspo_index(self.config.index_file).find_frames(task)
        if frames is not None:
            shown = (frames[i] for i in spread_indices(len(frames), uniform.max_frames))
            return FrameSelection(SelectedFramesRequest(frame_indices=tuple(shown)))
        if self.config.on_missing == "uniform":
            return FrameSelection(uniform, used_fallback=True)
        raise UserError(
            f"the TSPO index {self.config.index_file} has no record of task {task.task_id!r} on "
            f"{task.video}. Set episode.selector.on_missing=uniform to fall back to uniform frames."
        )


@dataclass(frozen=True, slots=True)
class QuerySelector:
    config: FrameSelectorConfig
    ranker: FrameRanker

    async def select(self, task: Task, video: VideoInfo, uniform: OverviewRequest) -> FrameSelection:
        config = self.config
        pixels = config.max_candidate_pixels
        search = SelectionParams(
            OverviewRequest(config.candidate_fps, config.max_candidates),
            FrameSize(min(FrameSize().min_pixels, pixels), pixels),
            uniform.max_frames,
            config.segment_share,
            config.diversity,
        )
        times = await self.ranker.rank_frames(task.video, strip_options(task.question), search)
        who = f"episode.selector.kind query with {config.model}"
        return FrameSelection(SelectedFramesRequest(validate_times(times, video, uniform.max_frames, who)))


@dataclass(frozen=True, slots=True)
class FunctionSelector:
    config: FrameSelectorConfig
    function: Callable[[VideoInfo, str, int], Sequence[float]]

    async def select(self, task: Task, video: VideoInfo, uniform: OverviewRequest) -> FrameSelection:
        who = f"episode.selector.kind {self.config.kind!r}"
        call = asyncio.to_thread(self._call, who, video, task.question, uniform.max_frames)
        times = await with_timeout(
            call, self.config.timeout_s, target=who, operation=f"the overview of {video.uri}"
        )
        return FrameSelection(SelectedFramesRequest(validate_times(times, video, uniform.max_frames, who)))

    def _call(self, who: str, video: VideoInfo, question: str, most: int) -> Sequence[float]:
        try:
            return self.function(video, question, most)
        except Exception as error:
            raise UserError(f"{who} on {video.uri} raised {type(error).__name__}: {error}") from error
