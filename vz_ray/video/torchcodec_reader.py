"""Reader based on torchcodec, for machines where its FFmpeg build is faster."""

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
_BATCH_SIZE = 16
"""Frames per decoder call; bounds the memory besides the result."""


class TorchcodecReader(VideoReader):
    """Reader that decodes and scales with torchcodec, at the frame times of the packet scan.

    torchcodec receives the scan as a frame mapping, so it does not scan again. Its pixels differ
    from those of `VideoReader`; references name the decoder. If torchcodec returns a frame with
    another time than the scan, the reader raises an error: use `pyav` for such a file.

    Raises (in addition to `VideoReader`):
        UserError: torchcodec cannot be loaded.
    """

    scaler = SCALER
    _decoder: tuple[tuple[int, int], VideoDecoder] | None = None

    @property
    def decoder(self) -> str:
        import torchcodec

        return f"torchcodec-{torchcodec.__version__}/{self.metadata.decoder.split('/')[1]}"

    def decode_pts(self, pts: Iterable[int], width: int, height: int) -> dict[int, Frame]:
        if not self._seekable:
            raise self._error("its packets have no reliable times")
        ordered = self._sort_and_check(pts)
        frames: dict[int, Frame] = {}
        for start in range(0, len(ordered), _BATCH_SIZE):
            batch = ordered[start : start + _BATCH_SIZE]
            for frame_pts, rgb in zip(batch, self._decode_batch(batch, width, height), strict=True):
                rgb.flags.writeable = False
                frames[frame_pts] = Frame(self._ref(frame_pts, width, height, rgb), rgb)
        return frames

    def close(self) -> None:
        self._decoder = None
        super().close()

    def _decode_batch(self, pts: list[int], width: int, height: int) -> list[RGB]:
        tick_s = float(self.table.time_base)
        try:
            # Half a tick later, so that rounding of the frame's time does not matter.
            times_s = [(frame_pts + 0.5) * tick_s for frame_pts in pts]
            batch = self._open(width, height).get_frames_played_at(times_s)
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._error(str(error).strip().splitlines()[0]) from error
        self._own_decoded += len(pts)
        for frame_pts, decoded_s in zip(pts, batch.pts_seconds.tolist(), strict=True):
            if abs(decoded_s - frame_pts * tick_s) > tick_s / 2:
                raise self._error(f"it returns a frame at {decoded_s:.4f} s instead of {frame_pts * tick_s:.4f} s")
        images = batch.data.numpy()
        if images.shape[1:] != (height, width, 3):
            raise self._error(f"it returns frames of {images.shape[2]} x {images.shape[1]}")
        return [np.ascontiguousarray(image) for image in images]

    def _open(self, width: int, height: int) -> VideoDecoder:
        """Return the decoder for this size; the last one is cached."""
        if self._decoder is None or self._decoder[0] != (width, height):
            decoders, transforms = import_torchcodec()
            self._own_seeks += 1
            decoder = decoders.VideoDecoder(
                self._path or self._uri,
                stream_index=self.info.stream,
                seek_mode="exact",
                num_ffmpeg_threads=1,
                dimension_order="NHWC",
                transforms=[transforms.Resize((height, width))],
                custom_frame_mappings=self._frame_mapping(),
            )
            self._decoder = ((width, height), decoder)
        return self._decoder[1]

    def _frame_mapping(self) -> str:
        """Return the scan in torchcodec's JSON format."""
        pts, keyframes = self.table.pts, set(self.table.keyframe_pts.tolist())
        durations = np.diff(np.append(pts, self.table.end_pts))
        return json.dumps(
            {
                "frames": [
                    {"pts": frame_pts, "duration": duration, "key_frame": int(frame_pts in keyframes)}
                    for frame_pts, duration in zip(pts.tolist(), durations.tolist(), strict=True)
                ]
            }
        )

    def _error(self, cause: str) -> CorruptVideoError:
        return CorruptVideoError(
            f"{self._uri}: torchcodec cannot read the video ({cause}); set clips.decoder to pyav",
            "this part of the video could not be read",
        )


def import_torchcodec() -> tuple[Any, Any]:
    """Import torchcodec and return its modules `decoders` and `transforms`.

    Raises:
        UserError: torchcodec is not installed, or does not find FFmpeg.
    """
    try:
        from torchcodec import decoders, transforms
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            f"clips.decoder is torchcodec, which cannot be loaded ({str(error).strip().splitlines()[0]}); "
            "install vz_ray[torchcodec] and FFmpeg's shared libraries, or set clips.decoder to pyav"
        ) from error
    return decoders, transforms
