"""Plays one episode: the same code for training, evaluation, distillation and serving."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, replace

from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.task import Task
from vz_ray.episode.events import Asked, Begun, Ended, Watcher, nobody
from vz_ray.episode.gate import pass_gate
from vz_ray.episode.machine import Episode, State
from vz_ray.episode.protocols import FrameSource, Policy, Ranker
from vz_ray.episode.selectors import selector_of
from vz_ray.episode.trajectory import Context, EpisodeId, Sampling, Status, Trajectory
from vz_ray.episode.wire import WireFormat
from vz_ray.observe.deadline import within
from vz_ray.video.frame import Clip, FrameSize, Overview, Still, VideoError, VideoInfo, Zoom
from vz_ray.video.subtitles import Subtitle, read_subtitles

NO_VIDEO = VideoInfo("", "", 0, 0.0, 0.0, 0, 0)
"""Stands for the video of a chat that is about none: there is nothing in it to zoom into."""
SUBTITLES_S = 60.0
"""How long a file of subtitles may take to be read; it lies where the videos lie."""


async def play(
    task: Task,
    policy: Policy,
    frames: FrameSource,
    wire: WireFormat,
    config: EpisodeConfig,
    *,
    id: EpisodeId,
    sampling: Sampling,
    worker: str = "",
    ranker: Ranker | None = None,
    watcher: Watcher = nobody,
) -> Trajectory:
    """Plays `task` to its end.

    A video that cannot be opened gives a FAILED trajectory; a clip that cannot
    be decoded gives the model an error turn. Whatever else goes wrong (a dead
    actor, an overdue wait) is raised: the episode is owed again. `ranker` is
    for the frame selector `query`; `watcher` is told what happens when it does.
    """
    began = time.monotonic()
    size = FrameSize(config.min_pixels, config.max_pixels)
    try:
        videos = [await frames.probe(uri) for uri in task.videos] or [NO_VIDEO]
        episode = Episode(id, task, videos[0], wire, config, await _subtitles(task), more=tuple(videos[1:]))
        notes = await _show(episode, frames, size, ranker, watcher)
    except VideoError as error:
        return _failed(id, wire, error, worker, time.monotonic() - began)
    if config.gate.mode != "off" and episode.state is State.ACT:
        notes["gate"] = asdict(await pass_gate(episode, policy))
        if episode.turns:
            watcher(Ended(0, episode.turns[0]))
    while episode.state is not State.OVER:
        at, number = time.monotonic(), len(episode.turns)
        action = await policy.act(episode.prompt, episode.sampling(sampling), request=f"{id}/turn{number}")
        zoom = episode.act(action, time.monotonic() - at)
        clip = None
        if zoom is not None:
            watcher(Asked(number, zoom))
            clip = await _look(episode, zoom, frames, size)
        watcher(Ended(number, episode.turns[-1], clip))
    played = episode.trajectory(worker=worker, seconds=time.monotonic() - began)
    return replace(played, extra={**played.extra, **notes})


async def _show(
    episode: Episode, frames: FrameSource, size: FrameSize, ranker: Ranker | None, watcher: Watcher
) -> dict[str, object]:
    """Begins an episode with its overviews and pictures; what is to be noted of how they were chosen."""
    task, config = episode.task, episode.config
    selector = selector_of(config.selector, ranker)
    overviews, fell_back = [], False
    for uri, video in zip(task.videos, (episode.video, *episode.more), strict=False):
        selection = await selector.select(replace(task, video=uri), video, episode.overview)
        fell_back |= selection.fell_back
        overviews.append(await frames.overview(uri, selection.request, size))
    pictures = [(await frames.overview(uri, _picture(uri), size)).frames[0] for uri in task.pictures]
    first = overviews[0] if overviews else Clip(episode.overview, ())
    episode.begin(first, tuple(pictures), tuple(overviews[1:]))
    videos = (episode.video, *episode.more) if overviews else ()
    watcher(Begun(videos, tuple(overviews), tuple(pictures)))
    if config.selector.kind == "uniform":
        return {}
    return {"overview": {"selector": config.selector.kind, "fell_back": fell_back}}


def _picture(uri: str) -> Overview | Still:
    """How a picture of the question is asked for: benchmarks keep theirs as videos of one frame."""
    return Overview(1, 1) if uri.endswith(".mp4") else Still()


async def _look(episode: Episode, zoom: Zoom, frames: FrameSource, size: FrameSize) -> Clip | None:
    """The clip that was asked for, if it could be decoded and shown; the episode has its reply either way."""
    at = time.monotonic()
    try:
        clip = await frames.zoom(episode.task.videos[zoom.video], zoom, size)
    except VideoError as error:
        episode.no_clip(error.for_model)
        return None
    episode.clip(clip, time.monotonic() - at)
    return clip if isinstance(episode.turns[-1].zoom, Zoom) else None


async def _subtitles(task: Task) -> tuple[Subtitle, ...]:
    """Those of the video; a `VideoError` where they cannot be read."""
    if task.subtitles is None:
        return ()
    where = task.subtitles
    reading = asyncio.to_thread(read_subtitles, where.path, where.starts_s)
    return await within(SUBTITLES_S, reading, who="the disk", what=f"subtitles {where.path}")


def _failed(id: EpisodeId, wire: WireFormat, error: VideoError, worker: str, seconds: float) -> Trajectory:
    return Trajectory(
        id,
        wire.name,
        Context(()),
        (),
        Status.FAILED,
        worker=worker,
        seconds=seconds,
        error=str(error),
        extra={"in_short": error.for_model},
    )
