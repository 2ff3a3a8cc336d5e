"""The exact reader against a full decode from the beginning."""

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
    rotate_video,
    shift_video,
    stretch_video,
    write_video,
)
from vz_ray.video.errors import CorruptVideoError, VideoLimitExceededError
from vz_ray.video.frame import FrameSize
from vz_ray.video.video_file import VideoLimits
from vz_ray.video.video_reader import VideoReader

SMALL = FrameSize(min_pixels=28 * 28, max_pixels=56 * 56)
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
    VideoSpec(
        "ten_bit_x265.mp4", codec="libx265", gop=48, pix_fmt="yuv420p10le", options={"x265-params": QUIET}
    ),
    VideoSpec("av1.mp4", codec="libsvtav1", gop=60, b_frames=0, frames=160, options={"preset": "12"}),
    VideoSpec("av1.webm", codec="libsvtav1", gop=30, b_frames=0, frames=90, options={"preset": "12"}),
]


@pytest.mark.parametrize("made", MATRIX, ids=lambda made: made.name)
def test_every_frame_and_pts_equals_that_of_a_linear_decode(made: VideoSpec, tmp_path: Path) -> None:
    path = write_video(tmp_path, made)
    check_against_linear(path, seed=1)


def check_against_linear(path: Path, seed: int) -> None:
    linear = decode_sequentially(path)
    times = draw_query_times(linear, 300, seed)
    draw = np.random.default_rng(seed)
    with VideoReader(str(path)) as alone, VideoReader(str(path), num_threads=3) as together:
        width, height = alone.target_size(SMALL)
        while len(times):
            count = int(draw.integers(1, 24))
            asked, times = times[:count], times[count:]
            reader = (alone, together)[int(draw.integers(2))]
            for second, frame in zip(asked, reader.read_frames(asked, SMALL), strict=True):
                index = linear.frame_index_at(second)
                assert frame.pts_s == pytest.approx(linear.pts[index], abs=1e-9), second
                assert np.array_equal(frame.rgb, linear.rgb(index, width, height)), second


def test_frames_that_an_edit_list_cuts_off_are_not_there(tmp_path: Path) -> None:
    whole = write_video(tmp_path, VideoSpec("whole.mp4", gop=100))
    cut = tmp_path / "cut.mp4"
    shift_video(whole, cut, -1.0)
    with VideoReader(str(whole)) as reader, VideoReader(str(cut)) as other:
        assert len(other.table.pts) == len(reader.table.pts) - 25
        assert other.read_frames([0.0], SMALL)[0].ref.digest == reader.read_frames([1.0], SMALL)[0].ref.digest
    check_against_linear(cut, seed=3)


def test_one_at_a_time_and_backwards_are_as_exact_as_in_one_pass(tmp_path: Path) -> None:
    path = write_video(tmp_path, VideoSpec("video.mp4", gop=70))
    with VideoReader(str(path)) as reader:
        times = [k * 0.37 for k in range(34)]
        together = reader.read_frames(times, SMALL)
        apart = [reader.read_frames([second], SMALL)[0] for second in reversed(times)]
    assert [frame.ref for frame in together] == [frame.ref for frame in reversed(apart)]


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_parts_decoded_at_once_give_the_same_frames_for_no_more_decoding(
    threads: int, tmp_path: Path
) -> None:
    path = write_video(tmp_path, VideoSpec("video.mp4", gop=40))
    times = [k * 0.4 for k in range(32)]
    with VideoReader(str(path)) as alone, VideoReader(str(path), num_threads=threads) as together:
        before = together.decoded_frames
        assert [f.ref for f in together.read_frames(times, SMALL)] == [
            f.ref for f in alone.read_frames(times, SMALL)
        ]
        parts = together._parts(together._ordered(together.table.pts_at(t) for t in times))
        assert len(parts) == threads
        keys = [{together.table.keyframe_before(pts) for pts in part} for part in parts]
        assert sum(map(len, keys)) == len(set.union(*keys))  # no GOP is decoded by two
        assert max(map(len, parts)) <= 2 * min(map(len, parts)) + 4
        reorder = 8 * threads  # frames that each decoder puts out beyond the last one wanted
        assert together.decoded_frames - before <= alone.decoded_frames + reorder
        assert len(together.read_frames([1.0], SMALL)) == 1
    assert together._container is None
    assert all(other._container is None for other in together._others)


@pytest.mark.skipif(not TESTDATA.is_dir(), reason=f"the sample videos are not at {TESTDATA}")
@pytest.mark.parametrize("name", ["nasa_13013.mp4", "h265_video.mp4", "av1_video.mkv"])
def test_real_files_equal_a_linear_decode(name: str) -> None:
    check_against_linear(TESTDATA / name, seed=2)


@pytest.mark.skipif(not TESTDATA.is_dir(), reason=f"the sample videos are not at {TESTDATA}")
def test_of_several_video_streams_the_best_is_read() -> None:
    listed = json.loads((TESTDATA / "nasa_13013.mp4.stream3.all_frames_info.json").read_text())
    with VideoReader(str(TESTDATA / "nasa_13013.mp4")) as reader:
        assert reader.info.stream == 3
        got = [reader.table.to_seconds(int(pts)) for pts in reader.table.pts]
    assert got == pytest.approx([float(frame["pts_time"]) for frame in listed], abs=1e-5)


def test_the_duration_includes_the_last_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path, VideoSpec("video.mp4", frames=50, rate=10))
    with VideoReader(str(path)) as reader:
        assert reader.info.duration_s == pytest.approx(5.0)
        assert reader.info.fps == pytest.approx(10.0)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_metadata_is_applied(degrees: int, tmp_path: Path) -> None:
    flat = write_video(tmp_path, VideoSpec("flat.mp4", frames=5))
    turned = rotate_video(flat, tmp_path / "turned.mp4", degrees)
    size = FrameSize(min_pixels=28 * 28, max_pixels=96 * 64 * 4, factor=32)
    with VideoReader(str(flat)) as a, VideoReader(str(turned)) as b:
        sideways = degrees % 180 == 90
        assert (b.info.width, b.info.height) == ((64, 96) if sideways else (96, 64))
        expected = np.rot90(a.read_frames([0.08], size)[0].rgb, degrees // 90)
        assert np.array_equal(b.read_frames([0.08], size)[0].rgb, expected)


def test_white_is_white_and_black_black_whatever_the_range_of_the_file(tmp_path: Path) -> None:
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
        black, white = reader.read_frames([0, 0.1], SMALL)
    assert black.rgb.max() <= 1
    assert white.rgb.min() >= 252  # the scaler's own rounding


def test_frames_that_nobody_asked_for_are_not_all_decoded(tmp_path: Path) -> None:
    two_of_three = {"x264-params": "b-adapt=0:b-pyramid=none:scenecut=0"}
    path = write_video(tmp_path, VideoSpec("video.mp4", gop=250, frames=250, options=two_of_three))
    with VideoReader(str(path)) as reader:
        before = reader.decoded_frames
        reader.read_frames([9.0], SMALL)
        assert reader.decoded_frames - before < 90


@pytest.mark.parametrize("name", ["video.mp4", "video.mkv"])
def test_a_seek_lands_on_the_keyframe_before_and_not_a_gop_earlier(name: str, tmp_path: Path) -> None:
    path = write_video(tmp_path, VideoSpec(name, gop=40, options={"x264-params": "scenecut=0"}))
    with VideoReader(str(path)) as reader:
        before = reader.decoded_frames
        reader.read_frames([165 / 25], SMALL)
        assert reader.decoded_frames - before < 20


def test_two_requests_in_one_gop_decode_it_once(tmp_path: Path) -> None:
    path = write_video(tmp_path, VideoSpec("video.mp4", gop=250, frames=250))
    with VideoReader(str(path)) as reader:
        reader.read_frames([6.0], SMALL)
        seeks, decoded = reader.seeks, reader.decoded_frames
        reader.read_frames([6.4], SMALL)
        assert reader.seeks == seeks
        assert reader.decoded_frames - decoded < 20


def test_a_truncated_file_gives_what_is_left_of_it(tmp_path: Path) -> None:
    whole = write_video(tmp_path, VideoSpec("whole.mkv", gop=25)).read_bytes()
    path = tmp_path / "cut.mkv"
    path.write_bytes(whole[: len(whole) // 2])
    linear = decode_all_that_can_be(path)
    with VideoReader(str(path)) as reader:
        assert 1 < reader.info.duration_s < 12
        assert reader.read_frames([100.0], SMALL)[0].pts_s == pytest.approx(linear[-1])


def decode_all_that_can_be(path: Path) -> list[float]:
    shown: list[float] = []
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            try:
                shown += [float(frame.time) for frame in packet.decode()]
            except av.error.FFmpegError:
                continue
    return shown


def test_a_stream_that_turns_up_in_mid_file_is_passed_over(tmp_path: Path) -> None:
    content = bytearray(write_video(tmp_path, VideoSpec("whole.flv", gop=25)).read_bytes())
    at, tags = 13, []  # after the header, each tag: kind, size of its data, 7 bytes, data, size of the tag
    while at < len(content):
        tags.append(at)
        at += 11 + int.from_bytes(content[at + 1 : at + 4], "big") + 4
    content[tags[200]] = 8  # a video tag becomes one of sound
    path = tmp_path / "late.flv"
    path.write_bytes(content)
    with VideoReader(str(path)) as reader:
        assert len(reader.table.pts) == 319
        assert len(reader.read_frames([0.0, 12.0], SMALL)) == 2


def test_a_file_without_a_decodable_frame_is_damaged(tmp_path: Path) -> None:
    path = write_video(tmp_path, VideoSpec("video.mp4", gop=25, frames=30))
    data = bytearray(path.read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[start:end] = bytes(end - start)
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptVideoError, match="no frame of it can be decoded"):
        VideoReader(str(path))


def test_ten_hours_are_too_long_as_things_are_set(tmp_path: Path) -> None:
    path = tmp_path / "ten_hours.mp4"
    stretch_video(write_video(tmp_path, VideoSpec("ten_minutes.mp4", frames=601, rate=1, gop=50)), path, 60)
    with pytest.raises(
        VideoLimitExceededError, match="36060 s long, over the limit of 28800 s; cut it"
    ) as caught:
        VideoReader(str(path))
    assert caught.value.model_message == "the video is too long"


def test_16k_is_too_large_as_things_are_set(tmp_path: Path) -> None:
    path = tmp_path / "16k.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 16384, 2400, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(16384, 2400, "yuv420p")))
        container.mux(stream.encode(None))
    with pytest.raises(
        VideoLimitExceededError, match="frames of 39321600 pixels exceed the limit of 37748736"
    ) as caught:
        VideoReader(str(path))
    assert caught.value.model_message == "the video's resolution is too high"


def test_limits_are_checked_before_decoding(tmp_path: Path) -> None:
    path = str(write_video(tmp_path, VideoSpec("video.mp4", frames=50)))
    with pytest.raises(VideoLimitExceededError, match=r"over the limit of 1 s"):
        VideoReader(path, limits=VideoLimits(max_duration_s=1))
    with pytest.raises(VideoLimitExceededError, match=r"frames of 6144 pixels exceed the limit of 100;"):
        VideoReader(path, limits=VideoLimits(max_pixels=100))
    with (
        VideoReader(path, limits=VideoLimits(max_request_frames=3)) as reader,
        pytest.raises(VideoLimitExceededError, match="over 3"),
    ):
        reader.read_frames([0, 0.5, 1, 1.5], SMALL)
