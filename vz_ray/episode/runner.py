"""Plays one episode: the same code for training, evaluation, distillation and serving."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, replace

from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.task import Task
from vz_ray.episode.gate import pass_gate
from vz_ray.episode.machine import Episode, State
from vz_ray.episode.protocols import FrameSource, Policy, Ranker
from vz_ray.episode.selectors import selector_of
from vz_ray.episode.trajectory import Context, EpisodeId, Sampling, Status, Trajectory
from vz_ray.episode.wire import WireFormat
from vz_ray.observe.deadline import within
from vz_ray.video.frame import FrameSize, Overview, VideoError
from vz_ray.video.subtitles import Subtitle, read_subtitles

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
) -> Trajectory:
    """Plays `task` to its end.

    A video that cannot be opened gives a FAILED trajectory; a clip that cannot
    be decoded gives the model an error turn. Whatever else goes wrong (a dead
    actor, an overdue wait) is raised: the episode is owed again. `ranker` is
    for the frame selector `query`.
    """
    began = time.monotonic()
    size = FrameSize(config.min_pixels, config.max_pixels)
    try:
        video = await frames.probe(task.video)
        episode = Episode(id, task, video, wire, config, await _subtitles(task))
        selection = await selector_of(config.selector, ranker).select(task, video, episode.overview)
        overview = await frames.overview(task.video, selection.request, size)
        pictures = [await frames.overview(uri, Overview(1, 1), size) for uri in task.pictures]
        episode.begin(overview, tuple(picture.frames[0] for picture in pictures))
    except VideoError as error:
        return _failed(id, wire, str(error), worker, time.monotonic() - began)
    notes: dict[str, object] = {}
    if config.selector.kind != "uniform":
        notes["overview"] = {"selector": config.selector.kind, "fell_back": selection.fell_back}
    if config.gate.mode != "off" and episode.state is State.ACT:
        notes["gate"] = asdict(await pass_gate(episode, policy))
    while episode.state is not State.OVER:
        at = time.monotonic()
        turn = f"{id}/turn{len(episode.turns)}"
        action = await policy.act(episode.prompt, episode.sampling(sampling), request=turn)
        zoom = episode.act(action, time.monotonic() - at)
        if zoom is None:
            continue
        at = time.monotonic()
        try:
            clip = await frames.zoom(task.video, zoom, size)
        except VideoError as error:
            episode.no_clip(error.for_model)
        else:
            episode.clip(clip, time.monotonic() - at)
    played = episode.trajectory(worker=worker, seconds=time.monotonic() - began)
    return replace(played, extra={**played.extra, **notes})


async def _subtitles(task: Task) -> tuple[Subtitle, ...]:
    """Those of the video; a `VideoError` where they cannot be read."""
    if task.subtitles is None:
        return ()
    where = task.subtitles
    reading = asyncio.to_thread(read_subtitles, where.path, where.starts_s)
    return await within(SUBTITLES_S, reading, who="the disk", what=f"subtitles {where.path}")


def _failed(id: EpisodeId, wire: WireFormat, error: str, worker: str, seconds: float) -> Trajectory:
    nothing = Context(())
    return Trajectory(id, wire.name, nothing, (), Status.FAILED, worker=worker, seconds=seconds, error=error)
