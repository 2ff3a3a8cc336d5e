"""Synthetic long videos with a realistic bit rate: one encoded minute of motion and noise, repeated."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

FPS, GOP, B_FRAMES, CRF = 30, 250, 2, 23


def make_video(folder: Path, width: int, height: int, minutes: int) -> Path:
    """Create a video by repeating the packets of one encoded minute; existing files are reused."""
    path = folder / f"{width}x{height}-{minutes}min.mp4"
    if path.exists():
        return path
    minute = folder / f"{width}x{height}-minute.mp4"
    if not minute.exists():
        encode_minute(minute, width, height)
    part = path.with_suffix(".part.mp4")
    with av.open(str(minute)) as source, av.open(str(part), "w") as container:
        source_stream = source.streams.video[0]
        stream = container.add_stream_from_template(source_stream)
        assert source_stream.time_base is not None
        assert source_stream.duration is not None
        for lap in range(minutes):
            source.seek(0)
            for packet in source.demux(source_stream):
                if packet.dts is None or packet.pts is None:
                    continue
                packet.pts += lap * source_stream.duration
                packet.dts += lap * source_stream.duration
                packet.stream = stream
                container.mux(packet)
    part.rename(path)
    return path


def encode_minute(path: Path, width: int, height: int) -> None:
    """Encode a panning, shaking camera over a textured scene with moving objects and sensor noise."""
    print(f"encoding one minute at {width}x{height} ...", flush=True)
    rng = np.random.default_rng(0)
    scene = texture(rng, height * 2, width * 2)
    objects = [(texture(rng, height // 4, height // 4), rng.uniform(0.2, 2.0, 4)) for _ in range(4)]
    noise = rng.normal(0, 4, (8, height, width, 1)).astype(np.float32)
    part = path.with_suffix(".part.mp4")
    with av.open(str(part), "w") as container:
        options = {"crf": str(CRF), "preset": "veryfast"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = GOP, B_FRAMES
        for index in range(60 * FPS):
            t = index / FPS
            top = int(height / 2 * (1 + 0.9 * np.sin(t / 7))) + index % 2
            left = int(width / 2 * (1 + 0.9 * np.sin(t / 11))) + (index // 2) % 2
            image = scene[top : top + height, left : left + width].copy()
            for patch, (a, b, c, d) in objects:
                y = int((height - len(patch)) / 2 * (1 + np.sin(a * t + c)))
                x = int((width - len(patch)) / 2 * (1 + np.sin(b * t + d)))
                image[y : y + len(patch), x : x + len(patch)] = patch
            image = np.clip(image + noise[index % 8], 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    part.rename(path)


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return random texture with detail at every scale; each octave is weaker than the previous one."""
    image = np.full((height, width, 3), 128, dtype=np.float32)
    for octave in range(1, 8):
        cells = rng.normal(0, 60 / octave, (2**octave, 2**octave, 3)).astype(np.float32)
        rows = np.linspace(0, 2**octave - 1e-3, height, dtype=np.float32).astype(int)
        columns = np.linspace(0, 2**octave - 1e-3, width, dtype=np.float32).astype(int)
        image += cells[rows][:, columns]
    return image
