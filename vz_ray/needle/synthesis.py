"""Writes needle videos, their task files and the manifest with the truth.

Every file is complete or absent; a second call with the same settings makes
only what is missing.
"""

from __future__ import annotations

import json
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
"""Frames drawn at a time."""


def choose_question_kinds(
    shot_s: float, fps: float, questions: int, rng: random.Random
) -> tuple[QuestionKind, ...]:
    """Kinds of a video's questions: one of each; deep only where its flash lasts two file frames."""
    deep = shot_s / SLOTS_PER_SHOT**2 * fps >= 2
    fourth = QuestionKind.DEEP if deep else rng.choice((QuestionKind.IDENTIFY, QuestionKind.COUNT))
    return (QuestionKind.IDENTIFY, QuestionKind.COUNT, QuestionKind.DECOY, fourth)[-questions:]


def plan_videos(config: SynthConfig) -> dict[str, list[NeedleVideo]]:
    """Every video of every split; a pure function of the configuration."""
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
    """Draws and encodes one video to `path` (H.264 in MP4), whole or not at all."""
    import av

    temporary = path.with_suffix(".part.mp4")
    frames = round(video.duration_s * config.fps)
    with av.open(str(temporary), "w") as container:
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
            for offset, picture in enumerate(render_frames(video, times.tolist(), config.side)):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = start + offset, Fraction(1, config.fps)
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    temporary.replace(path)


def make_tasks(video: NeedleVideo, path: Path) -> list[Task]:
    """The video's questions as tasks."""
    return [
        Task(
            task_id=f"{path.stem}-{question.border}",
            video=str(path),
            question=question.text,
            answer=question.answer,
            answer_type=AnswerType.NUMBER
            if question.kind is QuestionKind.COUNT
            else AnswerType.MULTIPLE_CHOICE,
            source="needle",
            kind=str(question.kind),
            evidence_spans=question.events,
            extra=_truth(question),
        )
        for question in video.questions
    ]


def synthesize(config: SynthConfig, advance: Callable[[int], None] = lambda _: None) -> dict[str, Path]:
    """Makes everything that is missing; returns the task file of each split.

    Args:
        config: What to make.
        advance: Called with the number of videos done since the last call.

    Raises:
        UserError: The directory holds a world of other settings.
    """
    root = Path(config.directory)
    (root / "videos").mkdir(parents=True, exist_ok=True)
    videos = plan_videos(config)
    manifest = _manifest(config, videos)
    if (root / MANIFEST).exists() and (root / MANIFEST).read_bytes() != manifest:
        raise UserError(
            f"{root} holds a needle world of other settings: choose another directory or delete it"
        )
    jobs = [
        (video, _path(root, split, i), config)
        for split in SPLITS
        for i, video in enumerate(videos[split])
        if not _path(root, split, i).exists()
    ]
    advance(sum(map(len, videos.values())) - len(jobs))
    # Spawned, not forked: the caller may hold threads and open engines.
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(_encode, jobs, chunksize=2):
            advance(1)
    files = {split: root / f"{split}.json" for split in SPLITS}
    for split, path in files.items():
        tasks = [t for i, v in enumerate(videos[split]) for t in make_tasks(v, _path(root, split, i))]
        write_atomic(path, encode_tasks(path, tasks))
    write_atomic(root / MANIFEST, manifest)
    return files


def _truth(question: NeedleQuestion) -> dict[str, object]:
    """What an oracle needs to play the question."""
    return {
        "path": question.zoom_path,
        "borders": question.border_spans,
        "symbol": question.symbol,
        "border": question.border,
    }


def _encode(job: tuple[NeedleVideo, Path, SynthConfig]) -> None:
    encode_video(*job)


def _path(root: Path, split: str, index: int) -> Path:
    return root / "videos" / f"{split}-{index:04d}.mp4"


def _manifest(config: SynthConfig, videos: dict[str, list[NeedleVideo]]) -> bytes:
    """The truth about every video and question, as JSON."""
    settings = {key: value for key, value in asdict(config).items() if key not in ("directory", "workers")}
    listed, questions = [], {}
    for split in SPLITS:
        for i, video in enumerate(videos[split]):
            path = _path(Path(), split, i)
            timeline = asdict(video)
            del timeline["questions"]
            listed.append({"file": str(path), "split": split, **timeline})
            for task, question in zip(make_tasks(video, path), video.questions, strict=True):
                questions[task.task_id] = {
                    "kind": str(question.kind),
                    "events": question.events,
                    **_truth(question),
                }
    content = {"version": 2, "settings": settings, "videos": listed, "questions": questions}
    return (json.dumps(content, indent=1) + "\n").encode()
