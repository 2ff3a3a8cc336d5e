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

from vz_ray import actors
from vz_ray.clips import ClipPool
from vz_ray.config.benchmarks import BenchmarkConfig, BenchmarksConfig
from vz_ray.data.record import task_to_dict, to_line
from vz_ray.data.rl_file import check_videos
from vz_ray.data.task import Task
from vz_ray.desk import Desk, desk
from vz_ray.evaluate.benchmark_tables import print_outcome
from vz_ray.evaluate.benchmarks import (
    Benchmark,
    Missing,
    Source,
    mark_all,
    missing_videos,
    read_benchmark,
    sample,
)
from vz_ray.evaluate.benchmarks.pictures import picture_folder
from vz_ray.evaluate.curve import write_curve
from vz_ray.evaluate.modes import OWN, Mode
from vz_ray.evaluate.outcome import Played, outcome, write_outcome, write_samples
from vz_ray.evaluate.play import evaluate
from vz_ray.evaluate.results import EvalLog
from vz_ray.learner.model import check_checkpoint
from vz_ray.observe.errors import UserError
from vz_ray.report.curves import write_curves
from vz_ray.reward import require_scorers


@dataclass(frozen=True, slots=True)
class Exam:
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
    missing: Missing


def run_benchmarks(config: BenchmarksConfig) -> None:
    """Plays all benchmarks in all modes; writes and prints what came out.

    Raises:
        UserError: A benchmark's files are not what they should be, or videos are missing, or a model is.
    """
    exams = read_exams(config)
    models = {OWN: config.model, **config.compare}
    for checkpoint in models.values():
        check_checkpoint(checkpoint)
    modes = [replace(Mode.of(text), model=label) for label in models for text in config.modes]
    with desk(config) as at:
        for exam in exams:
            if exam.missing.videos:
                at.progress.say(f"{exam.benchmark.title}: {exam.missing}; going on without them")
        logs = {
            (exam.key, mode): _log(exam, mode, models[mode.model], config, at)
            for exam in exams
            for mode in modes
        }
        if any(_left(exam, logs[exam.key, mode]) for exam in exams for mode in modes):
            asyncio.run(_play(config, at, exams, models, logs))
        played = [
            Played(
                key=exam.key,
                adapter=exam.adapter,
                benchmark=exam.benchmark,
                asked=len(exam.tasks),
                missing=exam.missing,
                marks={m: mark_all(exam.benchmark, logs[exam.key, m].records) for m in modes},
            )
            for exam in exams
        ]
        write_all(config, at.run.path, played)


def write_all(config: BenchmarksConfig, run: Path, played: list[Played]) -> None:
    """The figures of a run: files, tables, and a curve where there are several modes."""
    found = outcome(played, config.evaluate, {OWN: config.model, **config.compare})
    write_outcome(run, found)
    for one in played:
        write_samples(run, one)
    print_outcome(found)
    print(f"figures: {run / 'benchmarks.json'}")
    if len(config.modes) > 1 or config.compare:
        write_curve(run, found)
        print(f"curve: {write_curves(run)}")


# -- reading ----------------------------------------------------------------------


def read_exams(config: BenchmarksConfig) -> list[Exam]:
    """Every benchmark's questions, in order; videos have been looked for, and some of them opened.

    Raises:
        UserError: No benchmarks; a file is not what it should be; videos are missing and may not be;
            a judge is needed and there is none.
    """
    if not config.benchmarks:
        raise UserError("no benchmarks: give a config such as conf/eval/mlvu.yaml, or set benchmarks.<name>")
    exams = [_read(key, entry, config) for key, entry in config.benchmarks.items()]
    lacking = [exam for exam in exams if exam.missing.videos]
    if lacking and not config.allow_missing:
        lines = "; ".join(f"{exam.benchmark.title}: {exam.missing}" for exam in lacking)
        raise UserError(f"{lines}. Set benchmarks.<name>.videos, or allow_missing=true to go on without them")
    for exam in exams:
        if not exam.tasks:
            raise UserError(f"{exam.benchmark.title}: no questions are left ({exam.missing})")
        check_videos(list(exam.tasks), exam.benchmark.title)
        require_scorers(config.reward, exam.tasks, exam.benchmark.title)
    return exams


def _read(key: str, entry: BenchmarkConfig, config: BenchmarksConfig) -> Exam:
    if not entry.annotations:
        raise UserError(f"benchmarks.{key}.annotations is empty; set it to the released file or its folder")

    def given(path: str) -> Path | None:
        return Path(config.data) / path if path else None

    annotations = Path(config.data) / entry.annotations
    source = Source(
        annotations=annotations,
        videos=given(entry.videos) or (annotations if annotations.is_dir() else annotations.parent),
        answers=given(entry.answers),
        subtitles=given(entry.subtitles),
        embedding_model=given(entry.embedding_model),
        pictures=picture_folder(config.pictures),
    )
    adapter = entry.adapter or key
    benchmark = read_benchmark(adapter, source)
    chosen = sample(benchmark.tasks, entry.sampling_strategy, config.seed)
    missing = missing_videos(chosen)
    gone = set(missing.videos)
    there = tuple(task for task in chosen if task.video not in gone)
    return Exam(key, adapter, benchmark, there, missing)


# -- playing ----------------------------------------------------------------------


def _log(exam: Exam, mode: Mode, model: str, config: BenchmarksConfig, at: Desk) -> EvalLog:
    """The log of a benchmark and mode, refused if it holds results of something else."""
    questions = blake3("".join(to_line(task_to_dict(task)) for task in exam.tasks).encode()).hexdigest()[:16]
    identity = {
        "model": model,
        "benchmark": exam.adapter,
        "questions": questions,
        "mode": str(mode),
        "episode": asdict(mode.rules(config.episode, config.uniform_prompt)),
    }
    return EvalLog(at.run.path / "eval" / exam.key / f"{mode.stage}.jsonl", identity)


def _left(exam: Exam, log: EvalLog) -> int:
    """Questions that have not been played to their end."""
    return sum((task.task_id, 0) not in log.done for task in exam.tasks)


async def _play(
    config: BenchmarksConfig,
    at: Desk,
    exams: list[Exam],
    models: dict[str, str],
    logs: dict[tuple[str, Mode], EvalLog],
) -> None:
    """Plays what the logs lack, model by model: the same decoders, and engines of the same settings."""
    async with AsyncExitStack() as stack:
        with at.timed("start Ray"):
            await stack.enter_async_context(actors.cluster_of(config))
            frames = await stack.enter_async_context(actors.clip_pool(config))
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
    model: str, left: list[tuple[Exam, Mode, EvalLog]], frames: ClipPool, config: BenchmarksConfig, at: Desk
) -> None:
    async with AsyncExitStack() as stack:
        with at.timed("start engine"), at.progress.stage("start engine", 1) as stage:
            starting = stack.enter_async_context(actors.fleet(config, model, frames, at.run))
            fleet = await at.interrupt.watch(starting)
            stage.advance()
        for exam, mode, log in left:
            name = f"{exam.key} {mode}"
            rules = mode.rules(config.episode, config.uniform_prompt)
            with at.timed(name), at.progress.stage(name, len(exam.tasks)) as stage:
                playing = evaluate(fleet, exam.tasks, log, rules, stage=mode.stage, advance=stage.advance)
                await at.interrupt.watch(playing)
