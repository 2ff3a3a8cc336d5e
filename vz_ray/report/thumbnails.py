"""Displayed frames, and their thumbnails, decoded again from their references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from vz_ray.env.protocols import FrameSource
from vz_ray.utils.timeouts import StepTimeout, with_timeout
from vz_ray.video.errors import VideoError
from vz_ray.video.frame import FrameRef
from vz_ray.video.image_encoding import encode_data_uri

T = TypeVar("T")


def evenly_spaced(items: Sequence[T], max_count: int) -> list[T]:
    """Return all items, or `max_count` evenly spaced ones."""
    count = len(items)
    return list(items) if count <= max_count else [items[k * count // max_count] for k in range(max_count)]


async def make_thumbnails(
    refs: Sequence[FrameRef], frames: FrameSource, *, max_side_px: int, timeout_s: float
) -> tuple[dict[FrameRef, str], str]:
    """Return a `data:` URI for each of `refs`, and the error if they are not available."""
    unique_refs = list(dict.fromkeys(refs))
    try:
        decoded = await with_timeout(
            frames.resolve(unique_refs),
            timeout_s,
            target="the frame source",
            operation=f"{len(unique_refs)} thumbnails",
        )
    except (VideoError, StepTimeout) as error:
        return {}, str(error)
    return {ref: encode_data_uri(frame.rgb, max_side_px) for ref, frame in zip(unique_refs, decoded, strict=True)}, ""
