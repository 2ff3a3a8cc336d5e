"""Run one episode. Training, evaluation, distillation and serving share this code."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

from vz_ray.config.episode import EpisodeConfig
from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.events import EpisodeStarted, EventCallback, TurnCompleted, ZoomRequested, ignore_event
from vz_ray.env.frame_selectors import create_frame_selector
from vz_ray.env.protocols import FrameRanker, FrameSource, Policy
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, SamplingParams, TokenContext, Trajectory, Turn
from vz_ray.env.zoom_env import EnvState, ZoomEnv
from vz_ray.env.zoom_gate import apply_zoom_gate
from vz_ray.utils.timeouts import with_timeout
from vz_ray.video.errors import VideoError
from vz_ray.video.frame import Clip, FrameSize, ImageRequest, OverviewRequest, VideoInfo, ZoomRequest
from vz_ray.video.subtitles import Subtitle, read_subtitles

NO_VIDEO_INFO = VideoInfo("", "", 0, 0.0, 0.0, 0, 0)
"""Placeholder for a chat without a video. Zoom calls are rejected."""
RESUMED_TURNS_KEY = "resumed_turns"
"""Key in `Trajectory.extra` for the number of turns of an interrupted attempt that were not sampled again."""
SUBTITLE_TIMEOUT_S = 60.0
"""Timeout for reading a subtitle file, which may be on network storage."""


async def run_episode(
    task: Task,
    policy: Policy,
    frame_source: FrameSource,
    chat_format: ChatFormat,
    config: EpisodeConfig,
    *,
    episode_id: EpisodeId,
    sampling_params: SamplingParams,
    worker: str = "",
    ranker: FrameRanker | None = None,
    on_event: EventCallback = ignore_event,
    completed_turns: Sequence[Turn] = (),
) -> Trajectory:
    """Run an episode until it ends.

    If a video cannot be opened, the trajectory is FAILED. If a clip cannot be decoded, the model gets
    an error message. All other exceptions (dead actor, timeout) propagate, so that the caller can retry.

    Args:
        episode_id: Id of the trajectory.
        sampling_params: Limits and seed are adjusted for each turn.
        worker: Name recorded in the trajectory.
        ranker: Image-text model, for the frame selector `query`.
        on_event: Callback for each event.
        completed_turns: First turns of an interrupted attempt. They are repeated without the policy, with the same
            tokens and frames. If a frame has changed, or with a zoom gate, the episode starts over.
    """
    started_at = time.monotonic()
    try:
        env = await _open_env(episode_id, task, frame_source, chat_format, config)
        extra = await _start_env(env, frame_source, ranker, on_event)
        if completed_turns and config.gate.mode == "off":
            if await _repeat_turns(env, completed_turns, frame_source, on_event):
                extra[RESUMED_TURNS_KEY] = len(completed_turns)
            else:
                env = await _open_env(episode_id, task, frame_source, chat_format, config)
                extra = await _start_env(env, frame_source, ranker, on_event)
    except VideoError as error:
        return Trajectory(
            episode_id,
            chat_format.name,
            TokenContext(()),
            (),
            EpisodeStatus.FAILED,
            worker=worker,
            seconds=time.monotonic() - started_at,
            error=str(error),
            extra={"model_message": error.model_message},
        )
    if config.gate.mode != "off" and env.state is EnvState.AWAITING_TURN:
        extra["gate"] = asdict(await apply_zoom_gate(env, policy))
        if env.turns:
            on_event(TurnCompleted(0, env.turns[0]))
    while env.state is not EnvState.DONE:
        turn_started_at, turn_index = time.monotonic(), len(env.turns)
        action = await policy.generate(
            env.prompt, env.turn_sampling_params(sampling_params), request_id=f"{episode_id}/turn{turn_index}"
        )
        zoom = env.step(action, time.monotonic() - turn_started_at)
        clip = None
        if zoom is not None:
            on_event(ZoomRequested(turn_index, zoom))
            clip = await _fetch_clip(env, zoom, frame_source)
        on_event(TurnCompleted(turn_index, env.turns[-1], clip))
    trajectory = env.trajectory(worker=worker, seconds=time.monotonic() - started_at)
    return replace(trajectory, extra={**trajectory.extra, **extra})


async def _repeat_turns(
    env: ZoomEnv, turns: Sequence[Turn], frame_source: FrameSource, on_event: EventCallback
) -> bool:
    """Apply turns that were completed before. Return whether their observations are equal."""
    for turn_index, turn in enumerate(turns):
        if env.state is not EnvState.AWAITING_TURN:
            return False
        zoom, clip = env.step(turn.action, turn.seconds[0]), None
        if zoom is not None:
            clip = await _fetch_clip(env, zoom, frame_source)
        if env.turns[-1].observation != turn.observation:
            return False
        on_event(TurnCompleted(turn_index, env.turns[-1], clip))
    return True


async def _open_env(
    episode_id: EpisodeId, task: Task, frame_source: FrameSource, chat_format: ChatFormat, config: EpisodeConfig
) -> ZoomEnv:
    """Probe the videos and read the subtitles.

    Raises:
        VideoError: A video or the subtitle file cannot be read.
    """
    videos = [await frame_source.probe(uri) for uri in task.videos] or [NO_VIDEO_INFO]
    subtitles: tuple[Subtitle, ...] = ()
    if task.subtitles is not None:
        path, offset_s = task.subtitles.path, task.subtitles.offset_s
        subtitles = await with_timeout(
            asyncio.to_thread(read_subtitles, path, offset_s),
            SUBTITLE_TIMEOUT_S,
            target="the disk",
            operation=f"reading subtitles {path}",
        )
    return ZoomEnv(episode_id, task, videos[0], chat_format, config, subtitles, extra_videos=tuple(videos[1:]))


async def _start_env(
    env: ZoomEnv, frame_source: FrameSource, ranker: FrameRanker | None, on_event: EventCallback
) -> dict[str, object]:
    """Decode overviews and question images and start the environment.

    Return the trajectory's `extra` values about the frame selection.
    """
    task, config, size = env.task, env.config, _frame_size(env)
    selector = create_frame_selector(config.selector, ranker)
    overviews, used_fallback = [], False
    for uri, video in zip(task.videos, (env.video, *env.extra_videos), strict=False):
        selection = await selector.select(replace(task, video=uri), video, env.overview_request)
        used_fallback |= selection.used_fallback
        overviews.append(await frame_source.clip(uri, selection.request, size))
    images = [(await frame_source.clip(uri, _image_request(uri), size)).frames[0] for uri in task.images]
    first = overviews[0] if overviews else Clip(env.overview_request, ())
    env.start(first, tuple(images), tuple(overviews[1:]))
    videos = (env.video, *env.extra_videos) if overviews else ()
    on_event(EpisodeStarted(videos, tuple(overviews), tuple(images)))
    if config.selector.kind == "uniform":
        return {}
    return {"overview": {"selector": config.selector.kind, "used_fallback": used_fallback}}


def _image_request(uri: str) -> OverviewRequest | ImageRequest:
    """Return the request for a question image. Benchmarks store theirs as videos of one frame."""
    return OverviewRequest(1, 1) if uri.endswith(".mp4") else ImageRequest()


def _frame_size(env: ZoomEnv) -> FrameSize:
    return env.chat_format.grid.frame_size(env.config.min_pixels, env.config.max_pixels)


async def _fetch_clip(env: ZoomEnv, zoom: ZoomRequest, frame_source: FrameSource) -> Clip | None:
    """Decode the requested clip and add it, or an error message, to the environment.

    Return the clip; None if it could not be decoded or did not fit.
    """
    started_at = time.monotonic()
    try:
        clip = await frame_source.clip(env.task.videos[zoom.video], zoom, _frame_size(env))
    except VideoError as error:
        env.add_decode_error(error.model_message)
        return None
    env.add_clip(clip, time.monotonic() - started_at)
    return clip if isinstance(env.turns[-1].zoom, ZoomRequest) else None
