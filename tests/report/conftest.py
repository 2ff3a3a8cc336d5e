"""Fixture: a small run directory with real videos."""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from vz_ray.config.data import SynthConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.env.task import Task
from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    RejectedZoom,
    SampledAction,
    SamplingParams,
    TokenContext,
    Trajectory,
    Turn,
    VersionSpan,
    ZoomErrorKind,
)
from vz_ray.eval.eval_log import EvalLog, EvalResult
from vz_ray.eval.run_summary import eval_log_path, uniform_stage, write_summary
from vz_ray.monitoring import metric_names
from vz_ray.monitoring.metric_logger import MetricLogger
from vz_ray.monitoring.run_dir import record_stage_time
from vz_ray.needle.needle_video import QuestionKind, make_video
from vz_ray.needle.synthesis import encode_video, make_tasks
from vz_ray.rewards import score_episode
from vz_ray.video.frame import Clip, FrameSize, OverviewRequest, ZoomRequest
from vz_ray.video.local_source import LocalFrameSource

SIZE = FrameSize(28 * 28, 28 * 28, 28)


def make_context(clip: Clip) -> TokenContext:
    refs = clip.refs
    grids = tuple((1, ref.height // 14, ref.width // 14) for ref in refs)
    return TokenContext((7,) * len(refs), grids, refs, pad_id=7, merge_size=2)


def make_turn(text: str, zoom: ZoomRequest | RejectedZoom | None, observation: TokenContext | None) -> Turn:
    action = SampledAction((1, 2), (-0.1, -0.2), (VersionSpan(0, 2, 4),), SamplingParams(), "end")
    return Turn(action, text, zoom, observation, (0.1, 0.02))


class EpisodeFactory:
    """Creates synthetic episodes with real frames."""

    def __init__(self, frames: LocalFrameSource) -> None:
        self.frames = frames

    def overview(self, uri: str, count: int) -> TokenContext:
        request = OverviewRequest(fps=8, max_frames=count)
        return make_context(asyncio.run(self.frames.clip(uri, request, SIZE)))

    def zoom(self, uri: str, start: float, end: float, fps: float) -> Turn:
        request = ZoomRequest(start, end, fps)
        clip = asyncio.run(self.frames.clip(uri, request, SIZE))
        call = f'<video_zoom>{{"segment": [{start:g}, {end:g}], "fps": {fps:g}}}</video_zoom>'
        return make_turn(f"<think>The border shows up here.</think>{call}", request, make_context(clip))

    def make_episode(
        self, task: Task, stage: str, correct: bool, zooms: list[tuple[float, float, float]]
    ) -> EvalResult:
        turns = [self.zoom(task.video, *zoom) for zoom in zooms]
        if len(zooms) > 1:
            rejected = RejectedZoom(ZoomErrorKind.REVERSED, "segment [9, 4] ends before it starts")
            text = '<think>Again.</think><video_zoom>{"segment": [9, 4], "fps": 2}</video_zoom>'
            turns.insert(1, make_turn(text, rejected, TokenContext((3,))))
        answer = task.answer if correct else "F"
        turns.append(make_turn(f"<think>It is <b>clear</b>.</think><answer>{answer}</answer>", None, None))
        uniform = int(stage.removeprefix("uniform_")) if stage.startswith("uniform") else 16
        trajectory = Trajectory(
            EpisodeId(4, task.task_id, 0), "clean", self.overview(task.video, uniform), tuple(turns),
            EpisodeStatus.ANSWERED, answer=answer, worker="w0", seconds=0.4,
        )  # fmt: skip
        trajectory = replace(trajectory, reward=score_episode(trajectory, task, RewardConfig()))
        return EvalResult(task, trajectory, stage=stage, step=4)


def _write_metrics(path: Path) -> None:
    rng = random.Random(0)
    with MetricLogger(path) as log:
        for step in range(40):
            progress = 1 - math.exp(-step / 12)
            values = {
                metric_names.REWARD_TOTAL: 0.5 + 0.8 * progress + rng.gauss(0, 0.03),
                metric_names.REWARD_ACCURACY: 0.4 + 0.45 * progress + rng.gauss(0, 0.02),
                metric_names.REWARD_FORMAT: 0.9 + 0.09 * progress,
                metric_names.REWARD_TOOL: 0.3 + 0.5 * progress + rng.gauss(0, 0.02),
                metric_names.ZOOM_CALL_RATE: 0.7 + 0.28 * progress,
                metric_names.ZOOM_VALID_RATE: 0.75 + 0.2 * progress,
                metric_names.EVENT_COVERAGE: 0.3 + 0.55 * progress,
                metric_names.ZOOMS_PER_EPISODE: 1.1 + 0.4 * progress,
                metric_names.FRAMES_PER_EPISODE: 24 + 4 * progress,
                metric_names.MISMATCH_LOGPROB_MAX: 10 ** rng.uniform(-6.3, -5.8),
                metric_names.MISMATCH_KL: 10 ** rng.uniform(-9, -8.5),
                metric_names.WEIGHT_SYNC_SECONDS: 0.06 + 0.01 * rng.random(),
                metric_names.ENTROPY: 0.5 - 0.3 * progress,
                metric_names.GRAD_NORM: float("nan") if step == 7 else 1 + rng.random(),
                f"{metric_names.TIME_PREFIX}rollout_seconds": 2 + rng.random(),
                f"{metric_names.TIME_PREFIX}learn_seconds": 3 + rng.random(),
            }
            log.log(step, values)


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run with two agent evaluations and three uniform evaluations."""
    root = tmp_path_factory.mktemp("report")
    run, tasks = root / "quickstart", []
    for i in range(2):
        video = make_video(i, 64.0, (QuestionKind.IDENTIFY, QuestionKind.COUNT, QuestionKind.DECOY))
        path = root / f"v{i}.mp4"
        encode_video(video, path, SynthConfig())
        tasks += make_tasks(video, path)
    rights = {"cold_start": 2, "rl": 5, uniform_stage(16): 1, uniform_stage(32): 2, uniform_stage(64): 3}
    with LocalFrameSource() as frames:
        factory = EpisodeFactory(frames)
        for stage, right in rights.items():
            log = EvalLog(eval_log_path(run, stage), {"stage": stage})
            for k, task in enumerate(tasks):
                start, end = task.evidence_spans[0]
                zooms = [(max(0.0, start - 1.5), end + 1.5, 2.0), (start, end, 8.0)][: 1 + k % 2]
                log.append(factory.make_episode(task, stage, k < right, [] if "uniform" in stage else zooms))
    _write_metrics(run / "metrics.jsonl")
    for stage, seconds in {"synth": 41, "base": 210, "cold_start": 95, "rl": 260.5, "evaluate": 31}.items():
        record_stage_time(run, stage, seconds)
    (run / "config.yaml").write_text("seed: 0\nname: quickstart # <made up>\n")
    write_summary(run)
    return run
