"""`vz-ray eval`: benchmarks played greedily on the same engines and decoders as training.

read every benchmark's files, look for its videos          nothing is started before all is well
-> for each model, benchmark and mode: play what is left   a log per question, so it is resumable
-> marks, official figures, tables beside the paper's      benchmarks.json, .csv, samples/, curve.*
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from blake3 import blake3

from vz_ray.config.eval_run import BenchmarkConfig, EvalRunConfig
from vz_ray.data.episode_record import task_to_dict
from vz_ray.data.task_file import check_videos
from vz_ray.decode import DecodePool
from vz_ray.env.task import Task
from vz_ray.eval.accuracy_curve import write_curve
from vz_ray.eval.benchmark_results import (
    BenchmarkResults,
    build_benchmark_results,
    write_benchmark_results,
    write_samples,
)
from vz_ray.eval.benchmark_tables import print_benchmark_results
from vz_ray.eval.benchmarks import (
    Benchmark,
    BenchmarkFiles,
    MissingVideos,
    find_missing_videos,
    load_benchmark,
    score_results,
    subsample,
)
from vz_ray.eval.benchmarks.question_images import image_cache_dir
from vz_ray.eval.eval_log import EvalLog
from vz_ray.eval.eval_mode import MAIN_MODEL, EvalMode
from vz_ray.eval.runner import evaluate
from vz_ray.learner.policy_model import check_hf_checkpoint
from vz_ray.report.curve_report import write_curve_report
from vz_ray.rewards import check_scorers
from vz_ray.runtime import runtime
from vz_ray.runtime.run_context import RunContext, open_run
from vz_ray.utils.errors import UserError
from vz_ray.utils.json_lines import to_json_line


@dataclass(frozen=True, slots=True)
class BenchmarkSelection:
    """A benchmark and those of its questions that are to be played.

    Attributes:
        key: Its name in the run.
        adapter: What read it.
        benchmark: All that was read.
        tasks: What is played of it.
        missing: Videos that are not there, and how many of the chosen questions they take along.
    """

    key: str
    adapter: str
    benchmark: Benchmark
    tasks: tuple[Task, ...]
    missing: MissingVideos


def run_evaluation(config: EvalRunConfig) -> None:
    """Plays all benchmarks in all modes; writes and prints what came out.

    Raises:
        UserError: A benchmark's files are not what they should be, or videos are missing, or a model is.
    """
    exams = load_benchmarks(config)
    models = {MAIN_MODEL: config.model, **config.compare}
    for checkpoint in models.values():
        check_hf_checkpoint(checkpoint)
    modes = [replace(EvalMode.parse(text), model=label) for label in models for text in config.modes]
    with open_run(config) as at:
        for exam in exams:
            if exam.missing.paths:
                at.progress.print_line(f"{exam.benchmark.title}: {exam.missing}; going on without them")
        logs = {
            (exam.key, mode): _log(exam, mode, models[mode.model], config, at)
            for exam in exams
            for mode in modes
        }
        if any(_left(exam, logs[exam.key, mode]) for exam in exams for mode in modes):
            asyncio.run(_play(config, at, exams, models, logs))
        played = [
            BenchmarkResults(
                key=exam.key,
                adapter=exam.adapter,
                benchmark=exam.benchmark,
                num_questions=len(exam.tasks),
                missing_videos=exam.missing,
                scores={m: score_results(exam.benchmark, logs[exam.key, m].records) for m in modes},
            )
            for exam in exams
        ]
        write_reports(config, at.run_dir.path, played)


def write_reports(config: EvalRunConfig, run: Path, played: list[BenchmarkResults]) -> None:
    """The figures of a run: files, tables, and a curve where there are several modes."""
    found = build_benchmark_results(played, config.eval, {MAIN_MODEL: config.model, **config.compare})
    write_benchmark_results(run, found)
    for one in played:
        write_samples(run, one)
    print_benchmark_results(found)
    print(f"figures: {run / 'benchmarks.json'}")
    if len(config.modes) > 1 or config.compare:
        write_curve(run, found)
        print(f"curve: {write_curve_report(run)}")


# -- reading ----------------------------------------------------------------------


def load_benchmarks(config: EvalRunConfig) -> list[BenchmarkSelection]:
    """Every benchmark's questions, in order; videos have been looked for, and some of them opened.

    Raises:
        UserError: No benchmarks; a file is not what it should be; videos are missing and may not be;
            a judge is needed and there is none.
    """
    if not config.benchmarks:
        raise UserError("no benchmarks: give a config such as conf/eval/mlvu.yaml, or set benchmarks.<name>")
    exams = [_read(key, entry, config) for key, entry in config.benchmarks.items()]
    lacking = [exam for exam in exams if exam.missing.paths]
    if lacking and not config.allow_missing:
        lines = "; ".join(f"{exam.benchmark.title}: {exam.missing}" for exam in lacking)
        raise UserError(f"{lines}. Set benchmarks.<name>.videos, or allow_missing=true to go on without them")
    for exam in exams:
        if not exam.tasks:
            raise UserError(f"{exam.benchmark.title}: no questions are left ({exam.missing})")
        check_videos(list(exam.tasks), exam.benchmark.title)
        check_scorers(config.reward, exam.tasks, exam.benchmark.title)
    return exams


def _read(key: str, entry: BenchmarkConfig, config: EvalRunConfig) -> BenchmarkSelection:
    if not entry.annotations:
        raise UserError(f"benchmarks.{key}.annotations is empty; set it to the released file or its folder")

    def given(path: str) -> Path | None:
        return Path(config.data) / path if path else None

    annotations = Path(config.data) / entry.annotations
    source = BenchmarkFiles(
        annotations=annotations,
        video_dir=given(entry.videos) or (annotations if annotations.is_dir() else annotations.parent),
        answer_file=given(entry.answers),
        subtitle_dir=given(entry.subtitles),
        embedding_model_dir=given(entry.embedding_model),
        image_dir=image_cache_dir(config.image_cache_dir),
    )
    adapter = entry.adapter or key
    benchmark = load_benchmark(adapter, source)
    chosen = subsample(benchmark.tasks, entry.sampling_strategy, config.seed)
    missing = find_missing_videos(chosen)
    gone = set(missing.paths)
    there = tuple(task for task in chosen if task.video not in gone)
    return BenchmarkSelection(key, adapter, benchmark, there, missing)


# -- playing ----------------------------------------------------------------------


def _log(
    exam: BenchmarkSelection, mode: EvalMode, model: str, config: EvalRunConfig, at: RunContext
) -> EvalLog:
    """The log of a benchmark and mode, refused if it holds results of something else."""
    questions = blake3("".join(to_json_line(task_to_dict(task)) for task in exam.tasks).encode()).hexdigest()[
        :16
    ]
    identity = {
        "model": model,
        "benchmark": exam.adapter,
        "questions": questions,
        "mode": str(mode),
        "episode": asdict(mode.episode_config(config.episode, config.uniform_prompt)),
    }
    return EvalLog(at.run_dir.path / "eval" / exam.key / f"{mode.stage}.jsonl", identity)


def _left(exam: BenchmarkSelection, log: EvalLog) -> int:
    """Questions that have not been played to their end."""
    return sum((task.task_id, 0) not in log.completed for task in exam.tasks)


async def _play(
    config: EvalRunConfig,
    at: RunContext,
    exams: list[BenchmarkSelection],
    models: dict[str, str],
    logs: dict[tuple[str, EvalMode], EvalLog],
) -> None:
    """Plays what the logs lack, model by model: the same decoders, and engines of the same settings."""
    async with AsyncExitStack() as stack:
        with at.time_stage("start Ray"):
            await stack.enter_async_context(runtime.checked_ray_cluster(config))
            frames = await stack.enter_async_context(runtime.decode_pool(config))
        for label, model in models.items():
            left = [
                (exam, mode, log)
                for exam in exams
                for (key, mode), log in logs.items()
                if key == exam.key and mode.model == label and _left(exam, log)
            ]
            if left:
                await _play_model(model, left, frames, config, at)


async def _play_model(
    model: str,
    left: list[tuple[BenchmarkSelection, EvalMode, EvalLog]],
    frames: DecodePool,
    config: EvalRunConfig,
    at: RunContext,
) -> None:
    async with AsyncExitStack() as stack:
        with at.time_stage("start engine"), at.progress.stage("start engine", 1) as stage:
            starting = stack.enter_async_context(runtime.start_rollout(config, model, frames, at.run_dir))
            fleet = await at.interrupt.run_interruptible(starting)
            stage.advance()
        for exam, mode, log in left:
            name = f"{exam.key} {mode}"
            rules = mode.episode_config(config.episode, config.uniform_prompt)
            with at.time_stage(name), at.progress.stage(name, len(exam.tasks)) as stage:
                playing = evaluate(fleet, exam.tasks, log, rules, stage=mode.stage, on_progress=stage.advance)
                await at.interrupt.run_interruptible(playing)
