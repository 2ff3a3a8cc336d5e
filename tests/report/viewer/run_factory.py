"""Runs for the episode browser: a small one around real videos, and lines of a large one."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

import vz_ray
from vz_ray.config.data import SynthConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.data.episode_record import EpisodeRecord, append_records, record_to_dict
from vz_ray.env.task import Task
from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    RejectedZoom,
    RewardParts,
    SampledAction,
    SamplingParams,
    TokenContext,
    Trajectory,
    Turn,
    VersionSpan,
    ZoomErrorKind,
)
from vz_ray.eval.eval_log import EvalLog
from vz_ray.monitoring import metric_names
from vz_ray.monitoring.metric_logger import MetricLogger
from vz_ray.needle.needle_video import QuestionKind, make_video
from vz_ray.needle.synthesis import encode_video, make_tasks
from vz_ray.rewards import score_episode
from vz_ray.utils.json_lines import to_json_line
from vz_ray.video.frame import Clip, FrameRef, FrameSize, OverviewRequest, ZoomRequest
from vz_ray.video.local_source import LocalFrameSource

MODEL = Path(vz_ray.__file__).parent.parent / "assets" / "tiny-base"
SIDE = 112
SIZE = FrameSize(SIDE * SIDE, SIDE * SIDE, 28)
SECONDS = 64.0


def make_context(clip: Clip) -> TokenContext:
    grids = tuple((1, ref.height // 14, ref.width // 14) for ref in clip.refs)
    return TokenContext((7,) * len(grids), grids, clip.refs, pad_id=7, merge_size=2)


@dataclass
class TurnWriter:
    """Creates turns with tokens of the tiny model and random log-probs."""

    tokenizer: Tokenizer
    rng: random.Random

    def turn(
        self,
        text: str,
        version: int,
        zoom: ZoomRequest | RejectedZoom | None,
        observation: TokenContext | None,
    ) -> Turn:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        ids.append(self.tokenizer.token_to_id("<|im_end|>"))
        logprobs = tuple(-round(self.rng.expovariate(2.5), 4) for _ in ids)
        middle = len(ids) // 2
        spans = (VersionSpan(0, middle, version), VersionSpan(middle, len(ids), version + 1))
        action = SampledAction(tuple(ids), logprobs, spans, SamplingParams(seed=version), "end")
        return Turn(action, text, zoom, observation, (self.rng.uniform(0.2, 1.4), self.rng.uniform(0.01, 0.2)))


class EpisodeMaker:
    """Creates synthetic episodes with real frames of real videos."""

    def __init__(self, frames: LocalFrameSource, seed: int = 0) -> None:
        self.frames, self.rng = frames, random.Random(seed)
        self.writer = TurnWriter(Tokenizer.from_file(str(MODEL / "tokenizer.json")), self.rng)

    def zoom(self, task: Task, version: int, start: float, end: float, fps: float) -> Turn:
        request = ZoomRequest(start, end, fps)
        clip = asyncio.run(self.frames.clip(task.video, request, SIZE))
        call = f'<video_zoom>{{"segment":[{start:g},{end:g}],"fps":{fps:g}}}</video_zoom>'
        text = f"<think>the border is shown at {start:g}; more frames</think>{call}"
        return self.writer.turn(text, version, request, make_context(clip))

    def rejected(self, version: int) -> Turn:
        call = '<video_zoom>{"segment":[9,4],"fps":2}</video_zoom>'
        rejected_zoom = RejectedZoom(
            ZoomErrorKind.REVERSED, "segment [9, 4] ends before it starts", ZoomRequest(9, 4, 2)
        )
        return self.writer.turn(
            f"<think>nothing; more frames</think>{call}", version, rejected_zoom, TokenContext((3,))
        )

    def zooms(self, task: Task, sample: int, correct: bool) -> list[tuple[float, float, float]]:
        """Return zooms onto the evidence if `correct`, else beside it or too sparse."""
        start, end = task.evidence_spans[0]
        near = (max(0.0, round(start - 1)), min(SECONDS, round(end + 3)), 4.0)
        away = ((round(start) + 30) % 56, (round(start) + 30) % 56 + 6, 2.0)
        wide = (max(0.0, round(start - 8)), min(SECONDS, round(end + 8)), 1.0)
        return [[near], [wide, near], [away, wide, near]][sample % 3] if correct else [[away], [], [wide]][sample % 3]

    def make_episode(self, task: Task, step: int, sample: int, correct: bool) -> EpisodeRecord:
        version = 2 * step + 1
        turns = [self.zoom(task, version, *zoom) for zoom in self.zooms(task, sample, correct)]
        if sample == 3:
            turns.insert(0, self.rejected(version))
        answer = task.answer if correct else ("F" if task.answer != "F" else "A")
        turns.append(self.writer.turn(f"<think>clear</think><answer>{answer}</answer>", version, None, None))
        clip = asyncio.run(self.frames.clip(task.video, OverviewRequest(fps=8, max_frames=16), SIZE))
        seconds = sum(sum(turn.seconds) for turn in turns)
        trajectory = Trajectory(
            EpisodeId(step, task.task_id, sample), "clean", make_context(clip), tuple(turns), EpisodeStatus.ANSWERED,
            answer=answer, worker=f"rollout-{sample % 2}", seconds=seconds,
        )  # fmt: skip
        return EpisodeRecord(
            task,
            replace(trajectory, reward=score_episode(trajectory, task, RewardConfig())),
            "train",
            step,
        )


def with_advantages(records: Sequence[EpisodeRecord]) -> list[EpisodeRecord]:
    """Set the GRPO advantages of a group."""
    rewards = [record.trajectory.reward.total for record in records if record.trajectory.reward]
    mean = sum(rewards) / len(rewards)
    spread = (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5 or 1.0
    return [
        replace(record, advantage=(reward - mean) / spread) for record, reward in zip(records, rewards, strict=True)
    ]


def make_videos(folder: Path, count: int = 2) -> list[Task]:
    """Create one-minute needle videos and return their tasks."""
    tasks = []
    for number in range(count):
        video = make_video(number, SECONDS, (QuestionKind.IDENTIFY, QuestionKind.COUNT, QuestionKind.DECOY))
        path = folder / f"needle-{number}.mp4"
        encode_video(video, path, SynthConfig(side=SIDE))
        tasks += make_tasks(video, path)
    return tasks


def log_metrics(run: Path, steps: int) -> None:
    with MetricLogger(run / "metrics.jsonl") as log:
        for step in range(steps):
            log.log(
                step,
                {
                    metric_names.MISMATCH_LOGPROB_MAX: 3.2e-6,
                    metric_names.MISMATCH_KL: 4.1e-10,
                    metric_names.REWARD_TOTAL: 0.5,
                },
            )


def make_run(run: Path, tasks: Sequence[Task], steps: int = 6, samples: int = 4, seed: int = 0) -> Path:
    """Create a run of `steps` improving steps with two groups each, and one evaluation."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"name: {run.name}\nmodel: {MODEL}\nclips:\n  decoder: pyav\n")
    rng = random.Random(seed)
    with LocalFrameSource() as frames:
        maker = EpisodeMaker(frames, seed)
        for step in range(steps):
            for task in rng.sample(list(tasks), 2):
                chance = 0.2 + 0.7 * step / steps
                group = [maker.make_episode(task, step, k, rng.random() < chance) for k in range(samples)]
                append_records(run / "episodes" / f"{step:06d}.jsonl", with_advantages(group))
        log = EvalLog(run / "eval" / "rl.jsonl", {"stage": "rl"})
        for number, task in enumerate(tasks):
            log.append(replace(maker.make_episode(task, steps, 0, number % 3 > 0), stage="rl"))
    log_metrics(run, steps)
    return run


# -- a large run --------------------------------------------------------------------


@dataclass(frozen=True)
class LightEpisode:
    """Size of each of many episodes. Defaults: the quickstart."""

    samples: int = 8
    groups: int = 16
    frames: int = 16
    tokens: int = 40


def light_record(number: int, light: LightEpisode = LightEpisode()) -> EpisodeRecord:
    """Create one of many episodes without videos, with `groups` tasks per step."""
    rng = random.Random(number)
    step = number // (light.samples * light.groups)
    task = number // light.samples % (light.groups * 12)
    video_fields = ("blake3:" + "0" * 64, f"/videos/{task}.mp4", 0)
    refs = tuple(
        FrameRef(*video_fields, k * 4.0, 28, 28, "bicubic", "av", f"{number:064x}") for k in range(light.frames)
    )
    prompt = TokenContext((5, 6, *[7] * len(refs), 8), ((1, 2, 2),) * len(refs), refs, pad_id=7, merge_size=2)
    half = refs[: len(refs) // 2]
    zooms = rng.choice((0, 1, 1, 2))
    turns = [_light_turn(rng, step, ZoomRequest(8.0 * k, 8.0 * k + 4, 2), half, light.tokens) for k in range(zooms)]
    turns.append(_light_turn(rng, step, None, (), light.tokens))
    correct = rng.random() < 0.5
    trajectory = Trajectory(
        EpisodeId(step, f"t{task}", number % light.samples), "clean", prompt, tuple(turns), EpisodeStatus.ANSWERED,
        answer="A" if correct else "B", worker="rollout-0", seconds=rng.uniform(1, 5),
        reward=RewardParts(float(correct) * 0.9 + 0.1, float(correct), 1.0, 0.0),
    )  # fmt: skip
    question = f"Which symbol flashes while border {task} is shown?\nA. star\nB. ring"
    kind = ("identify", "count", "decoy")[task % 3]
    light_task = Task(f"t{task}", f"/videos/{task}.mp4", question, "A", kind=kind, evidence_spans=((9.0, 10.0),))
    return EpisodeRecord(light_task, trajectory, "train", step, rng.gauss(0, 1))


def light_line(number: int, light: LightEpisode = LightEpisode()) -> str:
    return to_json_line(record_to_dict(light_record(number, light)))


def _light_turn(rng: random.Random, step: int, zoom: ZoomRequest | None, refs: Sequence[FrameRef], count: int) -> Turn:
    action = SampledAction(
        tuple(rng.randrange(10, 900) for _ in range(count)), tuple(-rng.random() for _ in range(count)),
        (VersionSpan(0, count, step),), SamplingParams(), "end",
    )  # fmt: skip
    observation = (
        TokenContext((7,) * len(refs), ((1, 2, 2),) * len(refs), tuple(refs), pad_id=7, merge_size=2) if zoom else None
    )
    return Turn(action, "<think>look</think>", zoom, observation, (0.5, 0.01))


def write_light_run(run: Path, episodes: int, light: LightEpisode = LightEpisode(), per_file: int = 1000) -> Path:
    """Create a run of many light episodes: 2,000 distinct ones, repeated with other steps."""
    (run / "episodes").mkdir(parents=True)
    base = [json.loads(light_line(number, light)) for number in range(min(episodes, 2000))]
    for first in range(0, episodes, per_file):
        with (run / "episodes" / f"{first // per_file:06d}.jsonl").open("w") as file:
            for number in range(first, min(first + per_file, episodes)):
                value = base[number % len(base)]
                value["step"] = value["trajectory"]["id"]["step"] = number // 128
                file.write(to_json_line(value))
    return run
