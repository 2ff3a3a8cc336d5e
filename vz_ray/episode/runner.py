"""Plays one episode: the same code for training, evaluation, distillation and serving."""

from __future__ import annotations

import time

from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.task import Task
from vz_ray.episode.machine import Episode, State
from vz_ray.episode.protocols import FrameSource, Policy
from vz_ray.episode.trajectory import Context, EpisodeId, Sampling, Status, Trajectory
from vz_ray.episode.wire import WireFormat
from vz_ray.video.frame import FrameSize, VideoError


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
) -> Trajectory:
    """Plays `task` to its end.

    A video that cannot be opened gives a FAILED trajectory; a clip that cannot
    be decoded gives the model an error turn. Whatever else goes wrong (a dead
    actor, an overdue wait) is raised: the episode is owed again.
    """
    began = time.monotonic()
    size = FrameSize(config.min_pixels, config.max_pixels)
    try:
        video = await frames.probe(task.video)
        episode = Episode(id, task, video, wire, config)
        episode.begin(await frames.overview(task.video, episode.overview, size))
    except VideoError as error:
        return _failed(id, wire, str(error), worker, time.monotonic() - began)
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
    return episode.trajectory(worker=worker, seconds=time.monotonic() - began)


def _failed(id: EpisodeId, wire: WireFormat, error: str, worker: str, seconds: float) -> Trajectory:
    nothing = Context(())
    return Trajectory(id, wire.name, nothing, (), Status.FAILED, worker=worker, seconds=seconds, error=error)
