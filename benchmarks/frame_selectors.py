"""Comparison of frame selectors at the same number of overview frames.

The benchmark synthesizes needle videos and lets each selector choose the overview of each question. A
question counts as covered if every event that its answer depends on is visible in a frame of the overview.
With `--agent`, the agent answers the questions on each selector's overviews; the difference in accuracy to
`uniform` has a bootstrap interval over videos.

The last line of the output is one JSON object.

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
from statistics import fmean
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
from vz_ray.runtime import ray_cluster, runtime
from vz_ray.video.frame import Clip, FrameSize, OverviewRequest

GOP = 8
"""Keyframe interval in frames: one second, a common interval of streaming services."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="directory of the videos, the CLIP checkpoint and the logs"
    )
    parser.add_argument("--clip", type=Path, help="image-text checkpoint; default: train a tiny CLIP")
    parser.add_argument("--agent", type=Path, help="checkpoint of an agent to evaluate on the overviews")
    parser.add_argument("--answers-only", action="store_true", help="the agent cannot zoom")
    parser.add_argument("--videos", type=int, default=32, help="number of videos")
    parser.add_argument(
        "--segments",
        type=float,
        nargs="+",
        default=[FrameSelectorConfig().segment_share, 1.0],
        help="values of `segment_share` for the `query` selector",
    )
    parser.add_argument("--diversity", type=float, default=FrameSelectorConfig().diversity)
    args = parser.parse_args()
    tasks = make_needle_tasks(args.folder, args.videos)
    clip_dir = args.clip or args.folder / "clip"
    training_seconds = 0.0
    if not (clip_dir / "config.json").exists():
        started = time.monotonic()
        tiny_clip.train_clip(clip_dir)
        training_seconds = time.monotonic() - started
    query = FrameSelectorConfig(
        "query",
        model=str(clip_dir),
        candidate_fps=2.0,
        max_candidates=1024,
        max_candidate_pixels=12_544,
        diversity=args.diversity,
    )
    selectors = {"uniform": FrameSelectorConfig(), "keyframes": FrameSelectorConfig("keyframes")}
    selectors |= {f"query, segments {share:g}": replace(query, segment_share=share) for share in args.segments}
    figures = asyncio.run(compare_selectors(args.folder, tasks, selectors, args.agent, args.answers_only))
    header = {"questions": len(tasks), "clip_training_seconds": round(training_seconds, 1)}
    print(json.dumps({**header, "selectors": figures}))


def make_needle_tasks(folder: Path, videos: int) -> list[Task]:
    """Synthesize videos with one keyframe per second; their seeds differ from those of the quickstart."""
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
    """Return the figures of each selector."""
    config = load_config(GrpoRunConfig, "conf/laptop.yaml", [f"runs={folder / 'runs'}"])
    if answers_only:
        config.episode.prompt, config.episode.max_rounds = "conf/prompt/tiny-answer.yaml", 1
    config.episode.selector = list(selectors.values())[-1]
    figures: dict[str, Any] = {}
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(ray_cluster.ray_cluster(config.ray))
        decode_pool = await stack.enter_async_context(runtime.decode_pool(config))
        ranker = await runtime.load_image_text_ranker(config.episode.selector, decode_pool)
        for name, selector in selectors.items():
            episode_config = replace(config.episode, selector=selector)
            figures[name] = await measure_overviews(tasks, episode_config, decode_pool, ranker)
            print(name, figures[name], flush=True)
        if agent is not None:
            results = await evaluate_agent(folder, tasks, config, selectors, agent, decode_pool, stack)
            uniform_scores = accuracy_by_task(results["uniform"])
            video_by_task = {task.task_id: task.video for task in tasks}
            for name, selector_results in results.items():
                scores = accuracy_by_task(selector_results)
                gain = paired_difference(scores, uniform_scores, video_by_task)
                trajectories = [result.trajectory for result in selector_results]
                figures[name] |= {
                    "accuracy": round(fmean(scores.values()), 4),
                    "gain_over_uniform": [round(x, 4) for x in (gain.mean, gain.low, gain.high)],
                    "zooms_per_episode": round(fmean(len(t.zooms) for t in trajectories), 3),
                    "frames_per_episode": round(fmean(len(t.frame_refs) for t in trajectories), 2),
                }
    return figures


async def measure_overviews(
    tasks: Sequence[Task],
    episode_config: EpisodeConfig,
    decode_pool: DecodePool,
    ranker: FrameRankerHandle | None,
) -> dict[str, float]:
    """Return the share of covered questions, overall and per kind, and the cost of the overviews."""
    selector = create_frame_selector(episode_config.selector, ranker)
    uniform = OverviewRequest(
        episode_config.overview_fps, episode_config.overview_frames, episode_config.overview_spread
    )
    size = FrameSize(episode_config.min_pixels, episode_config.max_pixels, factor=28)
    started, clips = time.monotonic(), list[Clip]()
    for task in tasks:
        video = await decode_pool.probe(task.video)
        selection = await selector.select(task, video, uniform)
        clips.append(await decode_pool.clip(task.video, selection.request, size))
    covered_by_kind: dict[str, list[bool]] = {}
    for task, clip in zip(tasks, clips, strict=True):
        covered_by_kind.setdefault(task.kind, []).append(all_events_visible(task, clip))
    covered = [value for values in covered_by_kind.values() for value in values]
    return {
        "covered_questions": round(fmean(covered), 4),
        **{f"covered_questions_{kind}": round(fmean(values), 4) for kind, values in sorted(covered_by_kind.items())},
        "frames_per_overview": round(fmean(len(clip.frames) for clip in clips), 2),
        "seconds_per_question": round((time.monotonic() - started) / len(tasks), 3),
    }


def all_events_visible(task: Task, clip: Clip) -> bool:
    """Check that each event of the question is visible in a frame of the clip."""
    times_s = [frame.pts_s for frame in clip.frames]
    return all(any(start_s <= time_s < end_s for time_s in times_s) for start_s, end_s in task.evidence_spans)


async def evaluate_agent(
    folder: Path,
    tasks: Sequence[Task],
    config: GrpoRunConfig,
    selectors: Mapping[str, FrameSelectorConfig],
    agent: Path,
    decode_pool: DecodePool,
    stack: AsyncExitStack,
) -> dict[str, list[EvalResult]]:
    """Return the agent's results with each selector."""
    run_dir, _ = RunDir.create_or_resume(folder / "runs" / f"selectors-{config.episode.max_rounds}", "")
    rollout = runtime.start_rollout(config, agent, decode_pool, run_dir)
    scheduler = await stack.enter_async_context(rollout)
    results = {}
    for name, selector in selectors.items():
        episode_config = replace(config.episode, selector=selector)
        identity = {"agent": str(agent), "selector": vars(selector), "tasks": len(tasks)}
        log = EvalLog(run_dir.path / f"{name}.jsonl", identity)
        results[name] = await evaluate(scheduler, tasks, log, episode_config, stage=name)
    return results


if __name__ == "__main__":
    main()
