"""Needle videos, their synthesis and their task files."""

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

ALL_KINDS = (QuestionKind.IDENTIFY, QuestionKind.COUNT, QuestionKind.DECOY, QuestionKind.DEEP)
SMALL = {"train": 2, "sft": 1, "validation": 1, "test": 2, "shot_s": [4, 16], "workers": 1}


@pytest.mark.parametrize("seed", range(30))
def test_overview_shows_all_but_deep_borders(seed):
    video = make_video(seed, 256.0, ALL_KINDS)
    overview = [k * video.shot_s for k in range(16)]
    for question in video.questions:
        visible = [t for t in overview for b in video.borders if b.name == question.border and b.covers(t)]
        expected = {QuestionKind.DECOY: 2, QuestionKind.DEEP: None}.get(question.kind, 1)
        assert expected is None or len(visible) == expected
        last = question.zoom_path[-1]
        assert all(last[0] <= start < end <= last[1] for start, end in question.evidence_spans)


@pytest.mark.parametrize("seed", range(30))
def test_last_zoom_shows_each_flash_once(seed):
    for question in make_video(seed, 512.0, ALL_KINDS).questions:
        start, end = question.zoom_path[-1]
        times = [start + (end - start) * k / 8 for k in range(8)]
        assert [sum(a <= t < b for t in times) for a, b in question.evidence_spans] == [1] * len(
            question.evidence_spans
        )
        if question.kind is QuestionKind.COUNT:
            assert question.answer == str(len(question.evidence_spans))
        else:
            assert question.answer == LETTERS[SYMBOLS.index(question.symbol)]


def test_frame_depends_on_time_only():
    video = make_video(1, 128.0, ALL_KINDS)
    flash = video.flashes[0]
    images = render_frames(video, [flash.start_s, flash.end_s, flash.start_s], 56)
    assert (images[0] == images[2]).all()
    assert (images[0] != images[1]).any()


def test_too_many_questions_are_rejected():
    with pytest.raises(ValueError, match=r"len\(kinds\) is 5; it must be at most 4"):
        make_video(0, 64.0, (QuestionKind.COUNT,) * 5)


def test_splits_share_no_video():
    seeds = [video.seed for videos in plan_videos(SynthConfig()).values() for video in videos]
    assert len(set(seeds)) == len(seeds)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    config = SynthConfig(directory=str(tmp_path_factory.mktemp("needle")), **SMALL)
    return config, synthesize(config)


def test_files_are_h264_with_b_frames_and_long_gops(dataset):
    _, files = dataset
    with av.open(read_tasks(files["test"])[-1].video) as container:
        stream = container.streams.video[0]
        frames = [(frame.pict_type, frame.key_frame) for frame in container.decode(stream)]
    assert stream.codec_context.name == "h264"
    assert len(frames) == 16 * 16 * 8
    keys = [i for i, (_, key) in enumerate(frames) if key]
    assert all(after - before <= 250 for before, after in itertools.pairwise(keys))
    assert keys[1] > 100
    assert any(kind == av.video.frame.PictureType.B for kind, _ in frames)


def test_decoded_frames_match_rendering(dataset):
    config, files = dataset
    task = next(t for t in read_tasks(files["test"]) if t.kind == "deep")
    (start, end), video = task.evidence_spans[0], plan_videos(config)["test"][1]
    with LocalFrameSource() as frames:
        size = FrameSize(112 * 112, 112 * 112, 28)
        clip = asyncio.run(frames.clip(task.video, ZoomRequest(start, end, 1 / (end - start)), size))
        overview = asyncio.run(frames.clip(task.video, OverviewRequest(0.5, 16), size))
    for frame in (*clip.frames, *overview.frames):
        rendered = render_frames(video, [frame.pts_s], 112)[0].astype(float)
        assert np.abs(rendered - frame.rgb).mean() < 12


def test_hour_long_video_works_like_short_ones(tmp_path):
    sizes = {"train": 0, "sft": 0, "validation": 0, "test": 1, "shot_s": [256], "fps": 2, "workers": 1}
    config = SynthConfig(directory=str(tmp_path / "needle"), **sizes)
    (video,) = plan_videos(config)["test"]
    tasks = read_tasks(synthesize(config)["test"])
    size = FrameSize(112 * 112, 112 * 112, 28)
    with LocalFrameSource() as frames:
        info = asyncio.run(frames.probe(tasks[0].video))
        assert info.duration_s == pytest.approx(4096)
        overview = asyncio.run(frames.clip(tasks[0].video, OverviewRequest(0.5, 16), size))
        assert [frame.pts_s for frame in overview.frames] == [256.0 * k for k in range(16)]
        for task in tasks:
            (start, end), (a, b) = task.evidence_spans[0], task.extra["path"][-1]
            clip = asyncio.run(frames.clip(task.video, ZoomRequest(a, b, 8 / (b - a)), size))
            (evidence,) = [frame for frame in clip.frames if start <= frame.pts_s < end]
            rendered = render_frames(video, [evidence.pts_s], 112)[0].astype(float)
            assert np.abs(rendered - evidence.rgb).mean() < 12


def test_tasks_contain_ground_truth(dataset):
    _, files = dataset
    tasks = read_tasks(files["train"])
    check_videos(tasks, "train")
    assert len(tasks) == 8
    assert {t.kind for t in tasks} >= {"identify", "count", "decoy"}
    assert all(t.evidence_spans and t.extra["path"] and t.extra["border"] for t in tasks)


def test_second_call_creates_missing_files_only(dataset, monkeypatch):
    config, files = dataset
    video = read_tasks(files["train"])[0].video
    contents = {t.video: Path(t.video).read_bytes() for t in read_tasks(files["train"])}
    Path(video).unlink()
    mtime_ns = Path(read_tasks(files["test"])[0].video).stat().st_mtime_ns
    synthesize(config)
    assert Path(video).read_bytes() == contents[video]
    assert Path(read_tasks(files["test"])[0].video).stat().st_mtime_ns == mtime_ns


def test_other_config_does_not_overwrite_dataset(dataset):
    config, _ = dataset
    other = SynthConfig(**{**SMALL, "directory": config.directory, "seed": 9})
    with pytest.raises(UserError, match="another config"):
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
def test_invalid_task_file_is_reported(tmp_path, content, message):
    path = tmp_path / "tasks.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_tasks(path)


def test_wrong_answer_type_and_missing_video(tmp_path):
    record = {"videos": ["missing.mp4"], "problem": "<image>q", "solution": "A"}
    path = tmp_path / "tasks.json"
    for wrong in ("essay", "caption", ["number"]):
        path.write_text(json.dumps([{**record, "extra_info": {"answer_type": wrong}}]))
        with pytest.raises(
            UserError, match=rf"answer_type is {re.escape(repr(wrong))}; it must be one of multiple_choice"
        ):
            read_tasks(path)
    path.write_text(json.dumps([record]))
    with pytest.raises(UserError, match=r"1 of 1 videos of x do not exist, first .*missing\.mp4"):
        check_videos(read_tasks(path), "x")
