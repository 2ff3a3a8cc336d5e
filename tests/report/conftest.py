"""A small run directory around a real video."""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from vz_ray.config.data import SynthConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.data.needle.synth import encode, tasks_of
from vz_ray.data.needle.world import Kind, make_video
from vz_ray.data.task import Task
from vz_ray.episode.trajectory import (
    Context,
    EpisodeId,
    Sampled,
    Sampling,
    Status,
    Trajectory,
    Turn,
    VersionSpan,
    ZoomFault,
    ZoomRefused,
)
from vz_ray.evaluate.results import EvalLog, EvalResult
from vz_ray.evaluate.summary import eval_path, record_stage, uniform_stage, write_summary
from vz_ray.observe import names
from vz_ray.observe.metrics import MetricLog
from vz_ray.reward import score
from vz_ray.video.frame import Clip, FrameSize, Overview, Zoom
from vz_ray.video.local import LocalFrames

SIZE = FrameSize(28 * 28, 28 * 28, 28)


def context(clip: Clip) -> Context:
    refs = clip.refs
    grids = tuple((1, ref.height // 14, ref.width // 14) for ref in refs)
    return Context((7,) * len(refs), grids, refs, pad_id=7)


def turn(text: str, zoom: Zoom | ZoomRefused | None, reply: Context | None) -> Turn:
    said = Sampled((1, 2), (-0.1, -0.2), (VersionSpan(0, 2, 4),), Sampling(), "end")
    return Turn(said, text, zoom, reply, (0.1, 0.02))


class Player:
    """Plays made-up episodes on real frames."""

    def __init__(self, frames: LocalFrames) -> None:
        self.frames = frames

    def overview(self, uri: str, count: int) -> Context:
        request = Overview(fps=8, max_frames=count)
        return context(asyncio.run(self.frames.overview(uri, request, SIZE)))

    def zoom(self, uri: str, start: float, end: float, fps: float) -> Turn:
        request = Zoom(start, end, fps)
        clip = asyncio.run(self.frames.zoom(uri, request, SIZE))
        call = f'<video_zoom>{{"segment": [{start:g}, {end:g}], "fps": {fps:g}}}</video_zoom>'
        return turn(f"<think>The border shows up here.</think>{call}", request, context(clip))

    def play(
        self, task: Task, stage: str, right: bool, zooms: list[tuple[float, float, float]]
    ) -> EvalResult:
        turns = [self.zoom(task.video, *zoom) for zoom in zooms]
        if len(zooms) > 1:
            refused = ZoomRefused(ZoomFault.REVERSED, "segment [9, 4] ends before it starts")
            text = '<think>Again.</think><video_zoom>{"segment": [9, 4], "fps": 2}</video_zoom>'
            turns.insert(1, turn(text, refused, Context((3,))))
        answer = task.answer if right else "F"
        turns.append(turn(f"<think>It is <b>clear</b>.</think><answer>{answer}</answer>", None, None))
        uniform = int(stage.removeprefix("uniform_")) if stage.startswith("uniform") else 16
        played = Trajectory(
            EpisodeId(4, task.task_id, 0), "clean", self.overview(task.video, uniform), tuple(turns),
            Status.ANSWERED, answer=answer, worker="w0", seconds=0.4,
        )  # fmt: skip
        played = replace(played, reward=score(played, task, RewardConfig()))
        return EvalResult(task, played, stage=stage, step=4)


def _metrics(path: Path) -> None:
    rng = random.Random(0)
    with MetricLog(path) as log:
        for step in range(40):
            grown = 1 - math.exp(-step / 12)
            values = {
                names.REWARD_TOTAL: 0.5 + 0.8 * grown + rng.gauss(0, 0.03),
                names.REWARD_ACCURACY: 0.4 + 0.45 * grown + rng.gauss(0, 0.02),
                names.REWARD_FORMAT: 0.9 + 0.09 * grown,
                names.REWARD_TOOL: 0.3 + 0.5 * grown + rng.gauss(0, 0.02),
                names.ZOOM_CALL_RATE: 0.7 + 0.28 * grown,
                names.ZOOM_VALID_RATE: 0.75 + 0.2 * grown,
                names.EVENT_COVERAGE: 0.3 + 0.55 * grown,
                names.ZOOMS_MEAN: 1.1 + 0.4 * grown,
                names.FRAMES_MEAN: 24 + 4 * grown,
                names.MISMATCH_MAX: 10 ** rng.uniform(-6.3, -5.8),
                names.MISMATCH_KL: 10 ** rng.uniform(-9, -8.5),
                names.SYNC_S: 0.06 + 0.01 * rng.random(),
                names.ENTROPY: 0.5 - 0.3 * grown,
                names.GRAD_NORM: float("nan") if step == 7 else 1 + rng.random(),
                f"{names.TIME_PREFIX}rollout_s": 2 + rng.random(),
                f"{names.TIME_PREFIX}learn_s": 3 + rng.random(),
            }
            log.log(step, values)


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three agent stages' and two uniform evaluations' results."""
    root = tmp_path_factory.mktemp("report")
    run, tasks = root / "quickstart", []
    for i in range(2):
        video = make_video(i, 64.0, (Kind.IDENTIFY, Kind.COUNT, Kind.DECOY))
        path = root / f"v{i}.mp4"
        encode(video, path, SynthConfig())
        tasks += tasks_of(video, path)
    rights = {"cold_start": 2, "rl": 5, uniform_stage(16): 1, uniform_stage(32): 2, uniform_stage(64): 3}
    with LocalFrames() as frames:
        player = Player(frames)
        for stage, right in rights.items():
            log = EvalLog(eval_path(run, stage), {"stage": stage})
            for k, task in enumerate(tasks):
                start, end = task.events[0]
                zooms = [(max(0.0, start - 1.5), end + 1.5, 2.0), (start, end, 8.0)][: 1 + k % 2]
                log.append(player.play(task, stage, k < right, [] if "uniform" in stage else zooms))
    _metrics(run / "metrics.jsonl")
    for stage, seconds in {"synth": 41, "base": 210, "cold_start": 95, "rl": 260.5, "evaluate": 31}.items():
        record_stage(run, stage, seconds)
    (run / "config.yaml").write_text("seed: 0\nname: quickstart # <made up>\n")
    write_summary(run)
    return run
