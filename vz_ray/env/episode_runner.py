"""Plays one episode: the same code for training, evaluation, distillation and serving."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, replace

from vz_ray.config.episode import EpisodeConfig
from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.events import EpisodeStarted, EventCallback, TurnCompleted, ZoomRequested, ignore_event
from vz_ray.env.frame_selectors import create_frame_selector
from vz_ray.env.protocols import FrameRanker, FrameSource, Policy
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, SamplingParams, TokenContext, Trajectory
from vz_ray.env.zoom_env import EnvState, ZoomEnv
from vz_ray.env.zoom_gate import apply_zoom_gate
from vz_ray.utils.timeouts import with_timeout
from vz_ray.video.errors import VideoError
from vz_ray.video.frame import Clip, FrameSize, ImageRequest, OverviewRequest, VideoInfo, ZoomRequest
from vz_ray.video.subtitles import Subtitle, read_subtitles

NO_VIDEO_INFO = VideoInfo("", "", 0, 0.0, 0.0, 0, 0)
"""Stands for the video of a chat that is about none: there is nothing in it to zoom into."""
SUBTITLE_TIMEOUT_S = 60.0
"""How long a file of subtitles may take to be read; it lies where the videos lie."""


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
) -> Trajectory:
    """Plays `task` to its end.

    A video that cannot be opened gives a FAILED trajectory; a clip that cannot
    be decoded gives the model an error turn. Whatever else goes wrong (a dead
    actor, an overdue wait) is raised: the episode is owed again. `ranker` is
    for the frame selector `query`; `on_event` is told what happens when it does.
    """
    began = time.monotonic()
    size = FrameSize(config.min_pixels, config.max_pixels)
    try:
        videos = [await frame_source.probe(uri) for uri in task.videos] or [NO_VIDEO_INFO]
        episode = ZoomEnv(
            episode_id,
            task,
            videos[0],
            chat_format,
            config,
            await _load_subtitles(task),
            extra_videos=tuple(videos[1:]),
        )
        notes = await _start_env(episode, frame_source, size, ranker, on_event)
    except VideoError as error:
        return _failed_trajectory(episode_id, chat_format, error, worker, time.monotonic() - began)
    if config.gate.mode != "off" and episode.state is EnvState.AWAITING_TURN:
        notes["gate"] = asdict(await apply_zoom_gate(episode, policy))
        if episode.turns:
            on_event(TurnCompleted(0, episode.turns[0]))
    while episode.state is not EnvState.DONE:
        at, number = time.monotonic(), len(episode.turns)
        action = await policy.generate(
            episode.prompt,
            episode.turn_sampling_params(sampling_params),
            request_id=f"{episode_id}/turn{number}",
        )
        zoom = episode.step(action, time.monotonic() - at)
        clip = None
        if zoom is not None:
            on_event(ZoomRequested(number, zoom))
            clip = await _fetch_clip(episode, zoom, frame_source, size)
        on_event(TurnCompleted(number, episode.turns[-1], clip))
    played = episode.trajectory(worker=worker, seconds=time.monotonic() - began)
    return replace(played, extra={**played.extra, **notes})


async def _start_env(
    episode: ZoomEnv, frames: FrameSource, size: FrameSize, ranker: FrameRanker | None, watcher: EventCallback
) -> dict[str, object]:
    """Begins an episode with its overviews and pictures; what is to be noted of how they were chosen."""
    task, config = episode.task, episode.config
    selector = create_frame_selector(config.selector, ranker)
    overviews, fell_back = [], False
    for uri, video in zip(task.videos, (episode.video, *episode.extra_videos), strict=False):
        selection = await selector.select(replace(task, video=uri), video, episode.overview_request)
        fell_back |= selection.used_fallback
        overviews.append(await frames.overview(uri, selection.request, size))
    pictures = [(await frames.overview(uri, _image_request(uri), size)).frames[0] for uri in task.images]
    first = overviews[0] if overviews else Clip(episode.overview_request, ())
    episode.start(first, tuple(pictures), tuple(overviews[1:]))
    videos = (episode.video, *episode.extra_videos) if overviews else ()
    watcher(EpisodeStarted(videos, tuple(overviews), tuple(pictures)))
    if config.selector.kind == "uniform":
        return {}
    return {"overview": {"selector": config.selector.kind, "used_fallback": fell_back}}


def _image_request(uri: str) -> OverviewRequest | ImageRequest:
    """How a picture of the question is asked for: benchmarks keep theirs as videos of one frame."""
    return OverviewRequest(1, 1) if uri.endswith(".mp4") else ImageRequest()


async def _fetch_clip(
    episode: ZoomEnv, zoom: ZoomRequest, frames: FrameSource, size: FrameSize
) -> Clip | None:
    """The clip that was asked for, if it could be decoded and shown; the episode has its reply either way."""
    at = time.monotonic()
    try:
        clip = await frames.zoom(episode.task.videos[zoom.video], zoom, size)
    except VideoError as error:
        episode.add_decode_error(error.model_message)
        return None
    episode.add_clip(clip, time.monotonic() - at)
    return clip if isinstance(episode.turns[-1].zoom, ZoomRequest) else None


async def _load_subtitles(task: Task) -> tuple[Subtitle, ...]:
    """Those of the video; a `VideoError` where they cannot be read."""
    if task.subtitles is None:
        return ()
    where = task.subtitles
    reading = asyncio.to_thread(read_subtitles, where.path, where.offset_s)
    return await with_timeout(
        reading, SUBTITLE_TIMEOUT_S, target="the disk", operation=f"subtitles {where.path}"
    )


def _failed_trajectory(
    id: EpisodeId, wire: ChatFormat, error: VideoError, worker: str, seconds: float
) -> Trajectory:
    return Trajectory(
        id,
        wire.name,
        TokenContext(()),
        (),
        EpisodeStatus.FAILED,
        worker=worker,
        seconds=seconds,
        error=str(error),
        extra={"in_short": error.model_message},
    )
