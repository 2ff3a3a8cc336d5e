"""Which selector's overview shows what is asked about, at the same number of frames.

On needle videos made for it: for each question, the overview that each selector
chooses, and whether every event that the answer depends on is in one of its
frames; with `--agent`, how many questions that agent answers on it, zooming as
it likes, with a bootstrap interval over videos of the difference to `uniform`.

Prints one JSON object as its last line.

    python -m benchmarks.frame_selectors --folder selectors --agent runs/quickstart/models/rl
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import tiny_clip
from vz_ray.config import load_config
from vz_ray.config.data import SynthConfig
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.frame_selector import FrameSelectorConfig
from vz_ray.config.run import GrpoRunConfig
from vz_ray.data.task_file import read_tasks
from vz_ray.decode import DecodePool, FrameRankerHandle
from vz_ray.env.frame_selectors import create_frame_selector
from vz_ray.env.task import Task
from vz_ray.eval.bootstrap import paired_difference
from vz_ray.eval.eval_log import EvalLog, EvalResult
from vz_ray.eval.eval_metrics import accuracy_by_task
from vz_ray.eval.runner import evaluate
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.needle.synthesis import synthesize
from vz_ray.runtime import runtime
from vz_ray.video.frame import Clip, FrameSize, OverviewRequest

GOP = 8
"""Frames from one keyframe to the next: a second, as streaming services encode."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where videos, CLIP and logs are kept")
    parser.add_argument("--clip", type=Path, help="an image-text checkpoint; none trains a tiny one")
    parser.add_argument("--agent", type=Path, help="a checkpoint whose accuracy is measured too")
    parser.add_argument("--answers-only", action="store_true", help="the agent was taught no zoom")
    parser.add_argument("--videos", type=int, default=32)
    parser.add_argument(
        "--segments", type=float, nargs="+", default=[FrameSelectorConfig().segment_share, 1.0]
    )
    parser.add_argument("--diversity", type=float, default=FrameSelectorConfig().diversity)
    given = parser.parse_args()
    tasks = make_needle_tasks(given.folder, given.videos)
    clip = given.clip or given.folder / "clip"
    trained_s = 0.0
    if not (clip / "config.json").exists():
        began = time.monotonic()
        tiny_clip.train_clip(clip)
        trained_s = time.monotonic() - began
    query = FrameSelectorConfig(
        "query",
        model=str(clip),
        candidate_fps=2.0,
        max_candidates=1024,
        max_candidate_pixels=12_544,
        diversity=given.diversity,
    )
    selectors = {"uniform": FrameSelectorConfig(), "keyframes": FrameSelectorConfig("keyframes")}
    selectors |= {
        f"query, segments {share:g}": replace(query, segment_share=share) for share in given.segments
    }
    found = asyncio.run(compare_selectors(given.folder, tasks, selectors, given.agent, given.answers_only))
    print(json.dumps({"questions": len(tasks), "clip_training_s": round(trained_s, 1), **found}))


def make_needle_tasks(folder: Path, videos: int) -> list[Task]:
    """Test questions on videos with a keyframe every second; other seeds than any split of the quickstart."""
    config = SynthConfig(
        directory=str(folder / "needle"),
        seed=7,
        train=0,
        sft=0,
        validation=0,
        test=videos,
        gop=GOP,
        workers=1,
    )
    return read_tasks(synthesize(config)["test"])


async def compare_selectors(
    folder: Path,
    tasks: Sequence[Task],
    selectors: Mapping[str, FrameSelectorConfig],
    agent: Path | None,
    answers_only: bool,
) -> dict[str, Any]:
    config = load_config(GrpoRunConfig, "conf/tiny.yaml", [f"runs={folder / 'runs'}"])
    if answers_only:
        config.episode.prompt, config.episode.max_rounds = "conf/prompt/tiny-answer.yaml", 1
    config.episode.selector = list(selectors.values())[-1]
    found: dict[str, Any] = {}
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(runtime.ray_cluster(config.ray))
        frames = await stack.enter_async_context(runtime.decode_pool(config))
        ranker = await runtime.load_image_text_ranker(config.episode.selector, frames)
        for name, selector in selectors.items():
            rules = replace(config.episode, selector=selector)
            found[name] = await measure_coverage(tasks, rules, frames, ranker)
            print(name, found[name], flush=True)
        if agent is not None:
            results = await evaluate_agent(folder, tasks, config, selectors, agent, frames, stack)
            uniform = accuracy_by_task(results["uniform"])
            for name, played in results.items():
                scores = accuracy_by_task(played)
                gain = paired_difference(scores, uniform, {task.task_id: task.video for task in tasks})
                found[name] |= {
                    "accuracy": round(sum(scores.values()) / len(scores), 4),
                    "over_uniform": [round(x, 4) for x in (gain.mean, gain.low, gain.high)],
                    "zooms": round(sum(len(r.trajectory.zooms) for r in played) / len(played), 3),
                    "frames_seen": round(sum(len(r.trajectory.frame_refs) for r in played) / len(played), 2),
                }
    return found


async def measure_coverage(
    tasks: Sequence[Task], rules: EpisodeConfig, frames: DecodePool, ranker: FrameRankerHandle | None
) -> dict[str, float]:
    """Share of questions with every event in a frame, frames per overview, seconds to choose and decode."""
    selector = create_frame_selector(rules.selector, ranker)
    uniform = OverviewRequest(rules.overview_fps, rules.overview_frames, rules.overview_spread)
    size = FrameSize(rules.min_pixels, rules.max_pixels)
    began, clips = time.monotonic(), list[Clip]()
    for task in tasks:
        video = await frames.probe(task.video)
        selection = await selector.select(task, video, uniform)
        clips.append(await frames.overview(task.video, selection.request, size))
    pairs = list(zip(tasks, clips, strict=True))
    kinds = {
        kind: [events_visible(t, c) for t, c in pairs if t.kind == kind]
        for kind in sorted({t.kind for t in tasks})
    }
    return {
        "event_coverage": round(sum(events_visible(task, clip) for task, clip in pairs) / len(pairs), 4),
        **{f"event_coverage_{kind}": round(sum(hit) / len(hit), 4) for kind, hit in kinds.items()},
        "frames": round(sum(len(clip.frames) for clip in clips) / len(clips), 2),
        "seconds_per_question": round((time.monotonic() - began) / len(tasks), 3),
    }


def events_visible(task: Task, clip: Clip) -> bool:
    """Whether each event of the question is in some frame."""
    times = [frame.pts_s for frame in clip.frames]
    return all(any(start <= time < end for time in times) for start, end in task.evidence_spans)


async def evaluate_agent(
    folder: Path,
    tasks: Sequence[Task],
    config: GrpoRunConfig,
    selectors: Mapping[str, FrameSelectorConfig],
    agent: Path,
    frames: DecodePool,
    stack: AsyncExitStack,
) -> dict[str, list[EvalResult]]:
    """The agent's episodes on every selector's overviews."""
    run, _ = RunDir.create_or_resume(folder / "runs" / f"selectors-{config.episode.max_rounds}", "")
    fleet = await stack.enter_async_context(runtime.start_rollout(config, agent, frames, run))
    found = {}
    for name, selector in selectors.items():
        rules = replace(config.episode, selector=selector)
        identity = {"agent": str(agent), "selector": vars(selector), "tasks": len(tasks)}
        log = EvalLog(run.path / f"{name}.jsonl", identity)
        found[name] = await evaluate(fleet, tasks, log, rules, stage=name)
    return found


if __name__ == "__main__":
    main()
