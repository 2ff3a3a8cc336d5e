"""The needle world: what is asked is shown, and only where the truth says."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from pathlib import Path

import av
import numpy as np
import pytest

from vz_ray.config.data import SynthConfig
from vz_ray.data.task_file import check_videos, read_tasks
from vz_ray.needle import QuestionKind, make_video, render_frames
from vz_ray.needle.needle_video import LETTERS, SYMBOLS
from vz_ray.needle.synthesis import plan_videos, synthesize
from vz_ray.utils.errors import UserError
from vz_ray.video.frame import FrameSize, OverviewRequest, ZoomRequest
from vz_ray.video.local_source import LocalFrameSource

ALL = (QuestionKind.IDENTIFY, QuestionKind.COUNT, QuestionKind.DECOY, QuestionKind.DEEP)
SMALL = {"train": 2, "sft": 1, "validation": 1, "test": 2, "shot_s": [4, 16], "workers": 1}


@pytest.mark.parametrize("seed", range(30))
def test_an_overview_shows_every_border_but_the_deep_one(seed):
    video = make_video(seed, 256.0, ALL)
    overview = [k * video.shot_s for k in range(16)]
    for question in video.questions:
        shown = [t for t in overview for b in video.borders if b.name == question.border and b.covers(t)]
        expected = {QuestionKind.DECOY: 2, QuestionKind.DEEP: None}.get(question.kind, 1)
        assert expected is None or len(shown) == expected
        last = question.zoom_path[-1]
        assert all(last[0] <= start < end <= last[1] for start, end in question.events)


@pytest.mark.parametrize("seed", range(30))
def test_eight_frames_of_the_last_zoom_show_every_flash_once(seed):
    for question in make_video(seed, 512.0, ALL).questions:
        start, end = question.zoom_path[-1]
        times = [start + (end - start) * k / 8 for k in range(8)]
        assert [sum(a <= t < b for t in times) for a, b in question.events] == [1] * len(question.events)
        if question.kind is QuestionKind.COUNT:
            assert question.answer == str(len(question.events))
        else:
            assert question.answer == LETTERS[SYMBOLS.index(question.symbol)]


def test_a_frame_is_drawn_from_its_time_alone():
    video = make_video(1, 128.0, ALL)
    flash = video.flashes[0]
    pictures = render_frames(video, [flash.start_s, flash.end_s, flash.start_s], 56)
    assert (pictures[0] == pictures[2]).all()
    assert (pictures[0] != pictures[1]).any()


def test_more_questions_than_border_colours_are_refused():
    with pytest.raises(ValueError, match="5 questions in a video, at most 4"):
        make_video(0, 64.0, (QuestionKind.COUNT,) * 5)


def test_splits_share_no_video():
    seeds = [video.seed for videos in plan_videos(SynthConfig()).values() for video in videos]
    assert len(set(seeds)) == len(seeds)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    config = SynthConfig(directory=str(tmp_path_factory.mktemp("needle")), **SMALL)
    return config, synthesize(config)


def test_files_are_h264_with_b_frames_and_long_gops(world):
    _, files = world
    with av.open(read_tasks(files["test"])[-1].video) as container:
        stream = container.streams.video[0]
        frames = [(frame.pict_type, frame.key_frame) for frame in container.decode(stream)]
    assert stream.codec_context.name == "h264"
    assert len(frames) == 16 * 16 * 8
    keys = [i for i, (_, key) in enumerate(frames) if key]
    assert all(after - before <= 250 for before, after in itertools.pairwise(keys))
    assert keys[1] > 100
    assert any(kind == av.video.frame.PictureType.B for kind, _ in frames)


def test_decoded_frames_look_like_the_drawing(world):
    config, files = world
    task = next(t for t in read_tasks(files["test"]) if t.kind == "deep")
    (start, end), video = task.evidence_spans[0], plan_videos(config)["test"][1]
    with LocalFrameSource() as frames:
        size = FrameSize(112 * 112, 112 * 112)
        clip = asyncio.run(frames.zoom(task.video, ZoomRequest(start, end, 1 / (end - start)), size))
        overview = asyncio.run(frames.overview(task.video, OverviewRequest(0.5, 16), size))
    for frame in (*clip.frames, *overview.frames):
        drawn = render_frames(video, [frame.pts_s], 112)[0].astype(float)
        assert np.abs(drawn - frame.rgb).mean() < 12


def test_more_than_an_hour_is_searched_as_a_minute_is(tmp_path):
    sizes = {"train": 0, "sft": 0, "validation": 0, "test": 1, "shot_s": [256], "fps": 2, "workers": 1}
    config = SynthConfig(directory=str(tmp_path / "needle"), **sizes)
    (video,) = plan_videos(config)["test"]
    tasks = read_tasks(synthesize(config)["test"])
    size = FrameSize(112 * 112, 112 * 112)
    with LocalFrameSource() as frames:
        info = asyncio.run(frames.probe(tasks[0].video))
        assert info.duration_s == pytest.approx(4096)
        overview = asyncio.run(frames.overview(tasks[0].video, OverviewRequest(0.5, 16), size))
        assert [frame.pts_s for frame in overview.frames] == [256.0 * k for k in range(16)]
        for task in tasks:
            (start, end), (a, b) = task.evidence_spans[0], task.extra["path"][-1]
            clip = asyncio.run(frames.zoom(task.video, ZoomRequest(a, b, 8 / (b - a)), size))
            shown = [frame for frame in clip.frames if start <= frame.pts_s < end]
            assert len(shown) == 1
            drawn = render_frames(video, [shown[0].pts_s], 112)[0].astype(float)
            assert np.abs(drawn - shown[0].rgb).mean() < 12


def test_tasks_are_read_back_with_their_truth(world):
    _, files = world
    tasks = read_tasks(files["train"])
    check_videos(tasks, "train")
    assert len(tasks) == 8
    assert {t.kind for t in tasks} >= {"identify", "count", "decoy"}
    assert all(t.evidence_spans and t.extra["path"] and t.extra["border"] for t in tasks)


def test_a_second_call_makes_only_what_is_missing(world, monkeypatch):
    config, files = world
    video = read_tasks(files["train"])[0].video
    others = {t.video: Path(t.video).read_bytes() for t in read_tasks(files["train"])}
    Path(video).unlink()
    stamp = Path(read_tasks(files["test"])[0].video).stat().st_mtime_ns
    synthesize(config)
    assert Path(video).read_bytes() == others[video]
    assert Path(read_tasks(files["test"])[0].video).stat().st_mtime_ns == stamp


def test_other_settings_do_not_overwrite_a_world(world):
    config, _ = world
    other = SynthConfig(**{**SMALL, "directory": config.directory, "seed": 9})
    with pytest.raises(UserError, match="other settings"):
        synthesize(other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "contains no tasks"),
        ("{", "is not valid JSON"),
        ('[{"videos": ["a.mp4"], "problem": "q"}]', "record 0: key 'solution' is missing"),
        ('[{"videos": [], "problem": "q", "solution": "A"}]', "must be a list of one path"),
        ("[3]", "expected an object, got int"),
    ],
)
def test_a_bad_task_file_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "tasks.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_tasks(path)


def test_a_wrong_answer_type_and_a_missing_video_are_named(tmp_path):
    record = {"videos": ["gone.mp4"], "problem": "<image>q", "solution": "A"}
    path = tmp_path / "tasks.json"
    for wrong in ("essay", "caption", ["number"]):
        path.write_text(json.dumps([{**record, "extra_info": {"answer_type": wrong}}]))
        with pytest.raises(
            UserError, match=rf"answer_type is {re.escape(repr(wrong))}; it must be one of multiple_choice"
        ):
            read_tasks(path)
    path.write_text(json.dumps([record]))
    with pytest.raises(UserError, match=r"1 of 1 videos of x do not exist, first .*gone\.mp4"):
        check_videos(read_tasks(path), "x")
