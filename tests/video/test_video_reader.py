"""Exact video reader compared with a sequential decode of the whole file."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

from tests.video.sample_videos import (
    VideoSpec,
    decode_sequentially,
    draw_query_times,
    read_frames,
    rotate_video,
    shift_video,
    stretch_video,
    write_video,
)
from vz_ray.video.errors import CorruptVideoError, VideoLimitExceededError
from vz_ray.video.frame import FrameSize
from vz_ray.video.video_file import VideoLimits
from vz_ray.video.video_reader import VideoReader

SMALL = FrameSize(min_pixels=28 * 28, max_pixels=56 * 56, factor=28)
TESTDATA = Path(__file__).resolve().parents[3] / "shared" / "testdata"

QUIET = "log-level=none:pools=none"

MATRIX = [
    VideoSpec("long_gop.mp4"),
    VideoSpec("all_keys.mp4", gop=1, b_frames=0, frames=120),
    VideoSpec("uneven.mp4", rate=90, uneven=True, gop=40),
    VideoSpec("uneven.mkv", rate=90, uneven=True, gop=40, b_frames=3),
    VideoSpec("late_start.mp4", start=60, gop=50),
    VideoSpec("late_start.mkv", start=60, gop=50),
    VideoSpec("open_gop.mkv", gop=30, options={"x264-params": "open-gop=1:scenecut=0"}),
    VideoSpec("open_gop.ts", gop=30, options={"x264-params": "open-gop=1:scenecut=0"}),
    VideoSpec("pyramid.mp4", gop=60, b_frames=4, options={"x264-params": "b-pyramid=normal:scenecut=0"}),
    VideoSpec("refresh.mp4", gop=40, b_frames=0, options={"x264-params": "intra-refresh=1"}),
    VideoSpec("stream.ts", gop=48),
    VideoSpec("no_pts.avi", codec="mpeg4", gop=48),
    VideoSpec("h264.avi", gop=48),
    VideoSpec("h264.flv", gop=48),
    VideoSpec("program.mpg", codec="mpeg2video", gop=15),
    VideoSpec("x265.mp4", codec="libx265", gop=48, options={"x265-params": QUIET}),
    VideoSpec("vp8.webm", codec="libvpx", gop=60, b_frames=0, frames=160, options={"cpu-used": "8"}),
    VideoSpec("vp9.webm", codec="libvpx-vp9", gop=60, b_frames=0, frames=120, options={"cpu-used": "8"}),
    VideoSpec("ten_bit.mkv", gop=50, pix_fmt="yuv420p10le"),
    VideoSpec("one_gop.mp4", gop=600, frames=650),
    VideoSpec("mpeg4.mp4", codec="mpeg4", gop=48),
    VideoSpec("open_gop_x265.mkv", codec="libx265", gop=48, options={"x265-params": f"{QUIET}:open-gop=1"}),
    VideoSpec("ten_bit_x265.mp4", codec="libx265", gop=48, pix_fmt="yuv420p10le", options={"x265-params": QUIET}),
    VideoSpec("av1.mp4", codec="libsvtav1", gop=60, b_frames=0, frames=160, options={"preset": "12"}),
    VideoSpec("av1.webm", codec="libsvtav1", gop=30, b_frames=0, frames=90, options={"preset": "12"}),
]


@pytest.mark.parametrize("spec", MATRIX, ids=lambda spec: spec.name)
def test_frames_and_times_equal_a_sequential_decode(spec: VideoSpec, tmp_path: Path) -> None:
    path = write_video(tmp_path, spec)
    check_against_sequential_decode(path, seed=1)


def check_against_sequential_decode(path: Path, seed: int) -> None:
    reference = decode_sequentially(path)
    times = draw_query_times(reference, 300, seed)
    rng = np.random.default_rng(seed)
    with VideoReader(str(path)) as single, VideoReader(str(path), num_threads=3) as threaded:
        width, height = single.target_size(SMALL)
        while len(times):
            count = int(rng.integers(1, 24))
            batch, times = times[:count], times[count:]
            reader = (single, threaded)[int(rng.integers(2))]
            for second, frame in zip(batch, read_frames(reader, batch, SMALL), strict=True):
                index = reference.frame_index_at(second)
                assert frame.pts_s == pytest.approx(reference.pts[index], abs=1e-9), second
                assert np.array_equal(frame.rgb, reference.rgb(index, width, height)), second


def test_frames_cut_by_an_edit_list_are_skipped(tmp_path: Path) -> None:
    whole = write_video(tmp_path, VideoSpec("whole.mp4", gop=100))
    cut = tmp_path / "cut.mp4"
    shift_video(whole, cut, -1.0)
    with VideoReader(str(whole)) as reader, VideoReader(str(cut)) as other:
        assert len(other.table.pts) == len(reader.table.pts) - 25
        assert read_frames(other, [0.0], SMALL)[0].ref.digest == read_frames(reader, [1.0], SMALL)[0].ref.digest
    check_against_sequential_decode(cut, seed=3)


def test_single_backward_reads_equal_one_pass(tmp_path: Path) -> None:
    path = write_video(tmp_path, VideoSpec("video.mp4", gop=70))
    with VideoReader(str(path)) as reader:
        times = [k * 0.37 for k in range(34)]
        one_pass = read_frames(reader, times, SMALL)
        single_reads = [read_frames(reader, [second], SMALL)[0] for second in reversed(times)]
    assert [frame.ref for frame in one_pass] == [frame.ref for frame in reversed(single_reads)]


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_decode_the_same_frames_without_overhead(threads: int, tmp_path: Path) -> None:
    path = write_video(tmp_path, VideoSpec("video.mp4", gop=40))
    times = [k * 0.4 for k in range(32)]
    with VideoReader(str(path)) as single, VideoReader(str(path), num_threads=threads) as threaded:
        before = threaded.decoded_frames
        assert [f.ref for f in read_frames(threaded, times, SMALL)] == [
            f.ref for f in read_frames(single, times, SMALL)
        ]
        parts = threaded._split_by_gop(threaded._sort_and_check(threaded.table.pts_at(t) for t in times))
        assert len(parts) == threads
        keyframes = [{threaded.table.keyframe_before(pts) for pts in part} for part in parts]
        assert sum(map(len, keyframes)) == len(set.union(*keyframes))  # no GOP is decoded twice
        assert max(map(len, parts)) <= 2 * min(map(len, parts)) + 4
        reorder = 8 * threads  # frames output by each decoder after the last requested one
        assert threaded.decoded_frames - before <= single.decoded_frames + reorder
        assert len(read_frames(threaded, [1.0], SMALL)) == 1
    assert threaded._container is None
    assert all(helper._container is None for helper in threaded._helpers)


@pytest.mark.skipif(not TESTDATA.is_dir(), reason=f"no sample videos at {TESTDATA}")
@pytest.mark.parametrize("name", ["nasa_13013.mp4", "h265_video.mp4", "av1_video.mkv"])
def test_real_files_equal_a_sequential_decode(name: str) -> None:
    check_against_sequential_decode(TESTDATA / name, seed=2)


@pytest.mark.skipif(not TESTDATA.is_dir(), reason=f"no sample videos at {TESTDATA}")
def test_best_of_several_video_streams_is_read() -> None:
    listed_frames = json.loads((TESTDATA / "nasa_13013.mp4.stream3.all_frames_info.json").read_text())
    with VideoReader(str(TESTDATA / "nasa_13013.mp4")) as reader:
        assert reader.info.stream == 3
        times_s = [reader.table.to_seconds(int(pts)) for pts in reader.table.pts]
    assert times_s == pytest.approx([float(frame["pts_time"]) for frame in listed_frames], abs=1e-5)


def test_duration_includes_the_last_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path, VideoSpec("video.mp4", frames=50, rate=10))
    with VideoReader(str(path)) as reader:
        assert reader.info.duration_s == pytest.approx(5.0)
        assert reader.info.fps == pytest.approx(10.0)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_metadata_is_applied(degrees: int, tmp_path: Path) -> None:
    flat = write_video(tmp_path, VideoSpec("flat.mp4", frames=5))
    rotated = rotate_video(flat, tmp_path / "rotated.mp4", degrees)
    size = FrameSize(min_pixels=28 * 28, max_pixels=96 * 64 * 4, factor=32)
    with VideoReader(str(flat)) as a, VideoReader(str(rotated)) as b:
        is_transposed = degrees % 180 == 90
        assert (b.info.width, b.info.height) == ((64, 96) if is_transposed else (96, 64))
        expected = np.rot90(read_frames(a, [0.08], size)[0].rgb, degrees // 90)
        assert np.array_equal(read_frames(b, [0.08], size)[0].rgb, expected)


def test_limited_color_range_is_expanded(tmp_path: Path) -> None:
    path = tmp_path / "bars.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 56, 56, "yuv420p"
        for luma in (16, 235):
            planes = np.full((84, 56), 128, dtype=np.uint8)
            planes[:56] = luma
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode(None))
    with VideoReader(str(path)) as reader:
        black, white = read_frames(reader, [0, 0.1], SMALL)
    assert black.rgb.max() <= 1
    assert white.rgb.min() >= 252  # the scaler rounds


def test_unreferenced_frames_are_skipped(tmp_path: Path) -> None:
    two_of_three = {"x264-params": "b-adapt=0:b-pyramid=none:scenecut=0"}
    path = write_video(tmp_path, VideoSpec("video.mp4", gop=250, frames=250, options=two_of_three))
    with VideoReader(str(path)) as reader:
        before = reader.decoded_frames
        read_frames(reader, [9.0], SMALL)
        assert reader.decoded_frames - before < 90


@pytest.mark.parametrize("name", ["video.mp4", "video.mkv"])
def test_seek_does_not_decode_the_previous_gop(name: str, tmp_path: Path) -> None:
    path = write_video(tmp_path, VideoSpec(name, gop=40, options={"x264-params": "scenecut=0"}))
    with VideoReader(str(path)) as reader:
        before = reader.decoded_frames
        read_frames(reader, [165 / 25], SMALL)
        assert reader.decoded_frames - before < 20


def test_second_request_in_a_gop_continues_without_seek(tmp_path: Path) -> None:
    path = write_video(tmp_path, VideoSpec("video.mp4", gop=250, frames=250))
    with VideoReader(str(path)) as reader:
        read_frames(reader, [6.0], SMALL)
        seeks, decoded = reader.seeks, reader.decoded_frames
        read_frames(reader, [6.4], SMALL)
        assert reader.seeks == seeks
        assert reader.decoded_frames - decoded < 20


def test_truncated_file_is_read_up_to_its_end(tmp_path: Path) -> None:
    whole = write_video(tmp_path, VideoSpec("whole.mkv", gop=25)).read_bytes()
    path = tmp_path / "cut.mkv"
    path.write_bytes(whole[: len(whole) // 2])
    times_s = decodable_frame_times(path)
    with VideoReader(str(path)) as reader:
        assert 1 < reader.info.duration_s < 12
        assert read_frames(reader, [100.0], SMALL)[0].pts_s == pytest.approx(times_s[-1])


def decodable_frame_times(path: Path) -> list[float]:
    times_s: list[float] = []
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            try:
                times_s += [float(frame.time) for frame in packet.decode()]
            except av.error.FFmpegError:
                continue
    return times_s


def test_stream_that_starts_in_mid_file_is_ignored(tmp_path: Path) -> None:
    content = bytearray(write_video(tmp_path, VideoSpec("whole.flv", gop=25)).read_bytes())
    # FLV tags follow the 13-byte header: type, data size (3 bytes), 7 bytes, data, tag size (4 bytes).
    offset, tags = 13, []
    while offset < len(content):
        tags.append(offset)
        offset += 11 + int.from_bytes(content[offset + 1 : offset + 4], "big") + 4
    content[tags[200]] = 8  # a video tag becomes an audio tag
    path = tmp_path / "late.flv"
    path.write_bytes(content)
    with VideoReader(str(path)) as reader:
        assert len(reader.table.pts) == 319
        assert len(read_frames(reader, [0.0, 12.0], SMALL)) == 2


def test_file_without_decodable_frames_is_corrupt(tmp_path: Path) -> None:
    path = write_video(tmp_path, VideoSpec("video.mp4", gop=25, frames=30))
    data = bytearray(path.read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[start:end] = bytes(end - start)
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptVideoError, match="no frame can be decoded"):
        VideoReader(str(path))


def test_default_limit_rejects_ten_hours(tmp_path: Path) -> None:
    path = tmp_path / "ten_hours.mp4"
    stretch_video(write_video(tmp_path, VideoSpec("ten_minutes.mp4", frames=601, rate=1, gop=50)), path, 60)
    with pytest.raises(
        VideoLimitExceededError, match="duration 36060 s exceeds the limit of 28800 s; cut the video"
    ) as raised:
        VideoReader(str(path))
    assert raised.value.model_message == "the video is too long"


def test_default_limit_rejects_16k(tmp_path: Path) -> None:
    path = tmp_path / "16k.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 16384, 2400, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(16384, 2400, "yuv420p")))
        container.mux(stream.encode(None))
    with pytest.raises(
        VideoLimitExceededError, match="frames have 39321600 pixels, above the limit of 37748736"
    ) as raised:
        VideoReader(str(path))
    assert raised.value.model_message == "the video's resolution is too high"


def test_limits_are_checked_before_decoding(tmp_path: Path) -> None:
    path = str(write_video(tmp_path, VideoSpec("video.mp4", frames=50)))
    with pytest.raises(VideoLimitExceededError, match=r"exceeds the limit of 1 s"):
        VideoReader(path, limits=VideoLimits(max_duration_s=1))
    with pytest.raises(VideoLimitExceededError, match=r"frames have 6144 pixels, above the limit of 100;"):
        VideoReader(path, limits=VideoLimits(max_pixels=100))
    with (
        VideoReader(path, limits=VideoLimits(max_request_frames=3)) as reader,
        pytest.raises(VideoLimitExceededError, match="4 frames exceeds the limit of 3"),
    ):
        read_frames(reader, [0, 0.5, 1, 1.5], SMALL)
