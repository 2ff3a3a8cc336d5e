"""torchcodec as a second decoder behind the same interface, for machines where its FFmpeg is faster."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from vz_ray.utils.errors import UserError
from vz_ray.video.errors import CorruptVideoError
from vz_ray.video.frame import RGB, Frame
from vz_ray.video.video_reader import VideoReader

if TYPE_CHECKING:
    from torchcodec.decoders import VideoDecoder

SCALER = "torchcodec-resize"
_BATCH = 16
"""Frames decoded at a time, which bounds what is held beside the result."""


class TorchcodecReader(VideoReader):
    """Times are those of the scan, as ever; torchcodec decodes and scales.

    It is told what the scan found, so it does not scan again. Its pixels are not those of
    `VideoReader`, and references say so. A frame that it gives another time than the scan
    does is an error: such a file needs the other decoder.

    Raises (beyond those of `VideoReader`):
        UserError: torchcodec cannot be loaded here.
    """

    scaler = SCALER
    _decoder: tuple[tuple[int, int], VideoDecoder] | None = None

    @property
    def decoder(self) -> str:
        import torchcodec

        return f"torchcodec-{torchcodec.__version__}/{self.metadata.decoder.split('/')[1]}"

    def decode_pts(self, wanted: Iterable[int], width: int, height: int) -> dict[int, Frame]:
        if not self._seekable:
            raise self._unusable("its packets do not tell when frames are shown")
        ordered = self._ordered(wanted)
        found: dict[int, Frame] = {}
        for start in range(0, len(ordered), _BATCH):
            some = ordered[start : start + _BATCH]
            for pts, rgb in zip(some, self._decode_all(some, width, height), strict=True):
                rgb.flags.writeable = False
                found[pts] = Frame(self._ref(pts, width, height, rgb), rgb)
        return found

    def close(self) -> None:
        self._decoder = None
        super().close()

    def _decode_all(self, pts: list[int], width: int, height: int) -> list[RGB]:
        tick = float(self.table.time_base)
        try:
            # Half a tick later: what is meant is the frame, whichever way its time is rounded.
            batch = self._open(width, height).get_frames_played_at([(one + 0.5) * tick for one in pts])
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._unusable(str(error).strip().splitlines()[0]) from error
        self._own_decoded += len(pts)
        for one, got in zip(pts, batch.pts_seconds.tolist(), strict=True):
            if abs(got - one * tick) > tick / 2:
                raise self._unusable(f"the frame at {one * tick:.4f} s is one at {got:.4f} s there")
        pictures = batch.data.numpy()
        if pictures.shape[1:] != (height, width, 3):
            raise self._unusable(f"its frames come as {pictures.shape[2]} x {pictures.shape[1]} there")
        return [np.ascontiguousarray(picture) for picture in pictures]

    def _open(self, width: int, height: int) -> VideoDecoder:
        """The decoder for this size; the last one is kept."""
        if self._decoder is None or self._decoder[0] != (width, height):
            decoders, transforms = import_torchcodec()
            self._own_seeks += 1
            opened = decoders.VideoDecoder(
                self._path or self._uri,
                stream_index=self.info.stream,
                seek_mode="exact",
                num_ffmpeg_threads=1,
                dimension_order="NHWC",
                transforms=[transforms.Resize((height, width))],
                custom_frame_mappings=self._mapping(),
            )
            self._decoder = ((width, height), opened)
        return self._decoder[1]

    def _mapping(self) -> str:
        """The scan as torchcodec reads it."""
        pts, keys = self.table.pts, set(self.table.keyframe_pts.tolist())
        lasts = np.diff(np.append(pts, self.table.end_pts))
        return json.dumps(
            {
                "frames": [
                    {"pts": one, "duration": last, "key_frame": int(one in keys)}
                    for one, last in zip(pts.tolist(), lasts.tolist(), strict=True)
                ]
            }
        )

    def _unusable(self, why: str) -> CorruptVideoError:
        return CorruptVideoError(
            f"{self._uri}: torchcodec cannot read it as asked ({why}); set clips.decoder to pyav",
            "this part of the video could not be read",
        )


def import_torchcodec() -> tuple[Any, Any]:
    """Its modules `decoders` and `transforms`.

    Raises:
        UserError: It is not installed, or finds no FFmpeg.
    """
    try:
        from torchcodec import decoders, transforms
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            f"clips.decoder is torchcodec, which cannot be loaded ({str(error).strip().splitlines()[0]}); "
            "install vz_ray[torchcodec] and FFmpeg's shared libraries, or set clips.decoder to pyav"
        ) from error
    return decoders, transforms
