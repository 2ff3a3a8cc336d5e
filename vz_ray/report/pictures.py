"""Frames as small embedded images, rebuilt from their references."""

from __future__ import annotations

from collections.abc import Sequence

from vz_ray.episode.protocols import FrameSource
from vz_ray.observe.deadline import Overdue, within
from vz_ray.video.frame import FrameRef, VideoError
from vz_ray.video.image import data_uri


async def thumbnails(
    refs: Sequence[FrameRef], frames: FrameSource, *, longest: int, deadline_s: float
) -> tuple[dict[FrameRef, str], str]:
    """A `data:` URI for each of `refs`, and why there are none where that is so."""
    wanted = list(dict.fromkeys(refs))
    try:
        found = await within(
            deadline_s, frames.resolve(wanted), who="the frame source", what=f"{len(wanted)} thumbnails"
        )
    except (VideoError, Overdue) as error:
        return {}, str(error)
    return {ref: data_uri(frame.rgb, longest) for ref, frame in zip(wanted, found, strict=True)}, ""
