"""Frame selectors: choose the overview frames uniformly, from an index, by image-text model or by function.

Every selector returns a request that a frame source answers with an ordinary clip. A request contains
rates, times or frame numbers but never the question, so that samples of a task and questions with equal
selections share the decoded clip.

A user function, `episode.selector.kind: package.module:name`:

    def select(video: VideoInfo, question: str, max_frames: int) -> Sequence[float]

returns the times of the frames in seconds: ascending, unique, from 0 to `video.duration_s`, between 1
and `max_frames` of them. It is called once per episode in a thread of a rollout worker. It must be
deterministic.
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
from vz_ray.video.sampling import spread_indices

_MIN_CANDIDATE_PIXELS, _CANDIDATE_SIDE = 25_088, 28
"""Size of candidate frames. The image-text model resizes them again, so the policy's grid does not matter."""
_OPTION = re.compile(r"\s\(?A[.):]\s")


@dataclass(frozen=True, slots=True)
class FrameSelection:
    """Request for the selected frames, and whether uniform frames replaced a missing index record."""

    request: OverviewRequest | SelectedFramesRequest
    used_fallback: bool = False


class FrameSelector(Protocol):
    """Selector of overview frames."""

    async def select(self, task: Task, video: VideoInfo, uniform: OverviewRequest) -> FrameSelection:
        """Select the frames of one video. `uniform` is the default request with the episode's limits."""
        ...


def create_frame_selector(config: FrameSelectorConfig, ranker: FrameRanker | None = None) -> FrameSelector:
    """Create the configured selector. Index files are cached.

    Raises:
        UserError: The index file or function is invalid, or `ranker` is missing.
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
                    "episode.selector.kind is query; this command starts no image-text model. Use another kind."
                )
            return QuerySelector(config, ranker)
    function = load_function("episode.selector.kind", config.kind, ("video", "question", "max_frames"))
    return FunctionSelector(config, function)


def validate_times(times: Any, video: VideoInfo, max_frames: int, selector_name: str) -> tuple[float, ...]:
    """Validate and convert the times returned by a selector.

    Raises:
        UserError: The times violate the contract. The message names selector, video and value.
    """

    def invalid(problem: str) -> UserError:
        return UserError(f"{selector_name} on {video.uri}: {problem}")

    try:
        seconds = [float(time) for time in times]
    except (TypeError, ValueError) as error:
        raise invalid(f"returned {times!r}; it must return a sequence of seconds") from error
    if not seconds:
        raise invalid("returned no frame; it must return at least one")
    if len(seconds) > max_frames:
        raise invalid(f"returned {len(seconds)} frames; the maximum is {max_frames}")
    for previous, time in zip([-math.inf, *seconds], seconds, strict=False):
        if not math.isfinite(time):
            raise invalid(f"returned {time}, which is not finite")
        if not 0 <= time <= video.duration_s:
            raise invalid(f"returned {time:g} s; the video is from 0 to {video.duration_s:g} s")
        if time == previous:
            raise invalid(f"returned {time:g} s twice")
        if time < previous:
            raise invalid(f"returned {time:g} s after {previous:g} s; times must ascend")
    return tuple(seconds)


def strip_options(text: str) -> str:
    """Remove the options from a question, which would dominate the input of an image-text model.

    Example:
        strip_options("What flashes? A. disc B. ring") == "What flashes?"
    """
    return _OPTION.split(f"{text} ", maxsplit=1)[0].strip() or text


@dataclass(frozen=True, slots=True)
class UniformSelector:
    """Select frames independently of the question."""

    request: Callable[[OverviewRequest], OverviewRequest]

    async def select(self, task: Task, video: VideoInfo, uniform: OverviewRequest) -> FrameSelection:
        return FrameSelection(self.request(uniform))


@dataclass(frozen=True, slots=True)
class TspoSelector:
    config: FrameSelectorConfig

    async def select(self, task: Task, video: VideoInfo, uniform: OverviewRequest) -> FrameSelection:
        frames = load_tspo_index(self.config.index_file).find_frames(task)
        if frames is not None:
            indices = spread_indices(len(frames), uniform.max_frames)
            return FrameSelection(SelectedFramesRequest(frame_indices=tuple(frames[i] for i in indices)))
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
            FrameSize(min(_MIN_CANDIDATE_PIXELS, pixels), pixels, _CANDIDATE_SIDE),
            uniform.max_frames,
            config.segment_share,
            config.diversity,
        )
        times = await self.ranker.rank_frames(task.video, strip_options(task.question), search)
        selector_name = f"episode.selector.kind query with {config.model}"
        return FrameSelection(SelectedFramesRequest(validate_times(times, video, uniform.max_frames, selector_name)))


@dataclass(frozen=True, slots=True)
class FunctionSelector:
    config: FrameSelectorConfig
    function: Callable[[VideoInfo, str, int], Sequence[float]]

    async def select(self, task: Task, video: VideoInfo, uniform: OverviewRequest) -> FrameSelection:
        selector_name = f"episode.selector.kind {self.config.kind!r}"
        call = asyncio.to_thread(self._call, selector_name, video, task.question, uniform.max_frames)
        times = await with_timeout(
            call, self.config.timeout_s, target=selector_name, operation=f"the overview of {video.uri}"
        )
        return FrameSelection(SelectedFramesRequest(validate_times(times, video, uniform.max_frames, selector_name)))

    def _call(self, selector_name: str, video: VideoInfo, question: str, max_frames: int) -> Sequence[float]:
        try:
            return self.function(video, question, max_frames)
        except Exception as error:
            raise UserError(f"{selector_name} on {video.uri} raised {type(error).__name__}: {error}") from error
