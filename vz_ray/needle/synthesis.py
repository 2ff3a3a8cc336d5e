"""Synthesis of needle videos, task files and the manifest with the ground truth.

Files are written atomically. Another call with the same config creates only the missing files.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from vz_ray.config.data import SynthConfig
from vz_ray.data.task_file import MANIFEST, encode_tasks
from vz_ray.env.task import AnswerType, Task
from vz_ray.needle.frame_renderer import render_frames
from vz_ray.needle.needle_video import (
    NUM_SHOTS,
    SLOTS_PER_SHOT,
    NeedleQuestion,
    NeedleVideo,
    QuestionKind,
    make_video,
)
from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.errors import UserError

SPLITS = ("train", "sft", "validation", "test")
FRAMES_PER_CHUNK = 64


def choose_question_kinds(shot_s: float, fps: float, questions: int, rng: random.Random) -> tuple[QuestionKind, ...]:
    """Choose the question kinds of a video: one of each; deep only if its flash lasts two frames."""
    deep = shot_s / SLOTS_PER_SHOT**2 * fps >= 2
    fourth = QuestionKind.DEEP if deep else rng.choice((QuestionKind.IDENTIFY, QuestionKind.COUNT))
    return (QuestionKind.IDENTIFY, QuestionKind.COUNT, QuestionKind.DECOY, fourth)[-questions:]


def plan_videos(config: SynthConfig) -> dict[str, list[NeedleVideo]]:
    """Return the videos of each split, a pure function of the config."""
    videos: dict[str, list[NeedleVideo]] = {}
    for split_index, split in enumerate(SPLITS):
        rng = random.Random(config.seed * 1009 + split_index)
        videos[split] = []
        for i in range(config.videos[split]):
            shot_s = config.shot_s[i % len(config.shot_s)]
            kinds = choose_question_kinds(shot_s, config.fps, config.questions, rng)
            videos[split].append(make_video(rng.randrange(2**31), shot_s * NUM_SHOTS, kinds))
    return videos


def encode_video(video: NeedleVideo, path: Path, config: SynthConfig) -> None:
    """Render and encode one video to `path` (H.264 in MP4), atomically.

    Raises:
        OSError: The file cannot be written.
    """
    temporary = path.with_suffix(".part.mp4")
    try:
        _write_video(video, temporary, config)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        # PyAV's subclasses cannot be pickled, and the caller is another process.
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from None


def _write_video(video: NeedleVideo, path: Path, config: SynthConfig) -> None:
    import av

    frames = round(video.duration_s * config.fps)
    with av.open(str(path), "w") as container:
        options = {"crf": str(config.crf), "preset": "veryfast", "sc_threshold": "0"}
        stream = container.add_stream("libx264", rate=config.fps, options=options)
        stream.width = stream.height = config.side
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = config.gop
        stream.codec_context.max_b_frames = config.b_frames
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, config.fps)
        for start in range(0, frames, FRAMES_PER_CHUNK):
            times = np.arange(start, min(start + FRAMES_PER_CHUNK, frames)) / config.fps
            for offset, image in enumerate(render_frames(video, times.tolist(), config.side)):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = start + offset, Fraction(1, config.fps)
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def make_tasks(video: NeedleVideo, path: Path) -> list[Task]:
    """Convert the questions of a video to tasks."""
    return [
        Task(
            task_id=f"{path.stem}-{question.border}",
            video=str(path),
            question=question.text,
            answer=question.answer,
            answer_type=AnswerType.NUMBER if question.kind is QuestionKind.COUNT else AnswerType.MULTIPLE_CHOICE,
            source="needle",
            kind=str(question.kind),
            evidence_spans=question.evidence_spans,
            extra=_ground_truth(question),
        )
        for question in video.questions
    ]


def synthesize(config: SynthConfig, advance: Callable[[int], None] = lambda _: None) -> dict[str, Path]:
    """Create the missing videos and the task files; return the task file of each split.

    Args:
        config: Directory, sizes and encoding.
        advance: Callback with the number of videos finished since the last call.

    Raises:
        UserError: The directory contains a data set with another config.
    """
    root = Path(config.directory)
    (root / "videos").mkdir(parents=True, exist_ok=True)
    videos = plan_videos(config)
    manifest = _build_manifest(config, videos)
    if (root / MANIFEST).exists() and (root / MANIFEST).read_bytes() != manifest:
        raise UserError(
            f"synth.directory is {root}; it contains a data set with another config. "
            "Choose another directory or delete it."
        )
    jobs = [
        (video, _video_path(root, split, i), config)
        for split in SPLITS
        for i, video in enumerate(videos[split])
        if not _video_path(root, split, i).exists()
    ]
    advance(sum(map(len, videos.values())) - len(jobs))
    # Spawn instead of fork: the caller may have threads and engines.
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(_encode_job, jobs, chunksize=2):
            advance(1)
    files = {split: root / f"{split}.json" for split in SPLITS}
    for split, path in files.items():
        tasks = [t for i, v in enumerate(videos[split]) for t in make_tasks(v, _video_path(root, split, i))]
        write_atomic(path, encode_tasks(path, tasks))
    write_atomic(root / MANIFEST, manifest)
    return files


def _ground_truth(question: NeedleQuestion) -> dict[str, object]:
    """Return the ground truth that the oracle needs."""
    return {
        "path": question.zoom_path,
        "borders": question.border_spans,
        "symbol": question.symbol,
        "border": question.border,
    }


def _encode_job(job: tuple[NeedleVideo, Path, SynthConfig]) -> None:
    encode_video(*job)


def _video_path(root: Path, split: str, index: int) -> Path:
    return root / "videos" / f"{split}-{index:04d}.mp4"


def _build_manifest(config: SynthConfig, videos: dict[str, list[NeedleVideo]]) -> bytes:
    """Return the ground truth of all videos and questions as JSON."""
    settings = {key: value for key, value in asdict(config).items() if key not in ("directory", "workers")}
    entries, questions = [], {}
    for split in SPLITS:
        for i, video in enumerate(videos[split]):
            path = _video_path(Path(), split, i)
            timeline = asdict(video)
            del timeline["questions"]
            entries.append({"file": str(path), "split": split, **timeline})
            for task, question in zip(make_tasks(video, path), video.questions, strict=True):
                questions[task.task_id] = {
                    "kind": str(question.kind),
                    "events": question.evidence_spans,
                    **_ground_truth(question),
                }
    content = {"version": 2, "settings": settings, "videos": entries, "questions": questions}
    return (json.dumps(content, indent=1) + "\n").encode()
