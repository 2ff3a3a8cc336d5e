"""Body of `vz-ray eval`: run benchmarks with greedy sampling on the same engines and decoders as training.

load annotations, check videos and scorers            fails before anything starts
-> per model, benchmark and mode: run open questions   one log line per question, resumable
-> scores, official metrics, tables, curve             benchmarks.json, .csv, samples/, curve.*
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from blake3 import blake3

from vz_ray.config.eval_run import BenchmarkConfig, EvalRunConfig
from vz_ray.data.chat_format_loader import check_episode_format
from vz_ray.data.episode_record import task_to_dict
from vz_ray.data.task_file import check_videos
from vz_ray.decode import DecodePool
from vz_ray.eval.accuracy_curve import write_curve
from vz_ray.eval.benchmark_results import (
    BenchmarkResults,
    BenchmarkSelection,
    build_benchmark_results,
    write_benchmark_results,
    write_samples,
)
from vz_ray.eval.benchmark_tables import print_benchmark_results
from vz_ray.eval.benchmarks import (
    BenchmarkFiles,
    find_missing_videos,
    image_cache_dir,
    load_benchmark,
    score_results,
    subsample,
)
from vz_ray.eval.eval_log import EvalLog
from vz_ray.eval.eval_mode import MAIN_MODEL, EvalMode
from vz_ray.eval.runner import evaluate
from vz_ray.learner.policy_model import check_hf_checkpoint
from vz_ray.report.curve_report import write_curve_report
from vz_ray.rewards import check_scorers
from vz_ray.runtime import ray_cluster, runtime
from vz_ray.runtime.run_context import RunContext, open_run
from vz_ray.utils.errors import UserError
from vz_ray.utils.json_lines import to_json_line


@dataclass(frozen=True, slots=True)
class _EvalJob:
    """A benchmark in one mode, and the log of its episodes."""

    selection: BenchmarkSelection
    mode: EvalMode
    log: EvalLog

    @property
    def complete(self) -> bool:
        """Whether the log has a result for every task."""
        return all((task.task_id, 0) in self.log.completed for task in self.selection.tasks)


def run_evaluation(config: EvalRunConfig) -> None:
    """Evaluate all models on all benchmarks in all modes, then write and print the results.

    Raises:
        UserError: Annotations are malformed, videos are missing, or a model is not a valid checkpoint.
    """
    selections = load_benchmarks(config)
    models = {MAIN_MODEL: config.model, **config.compare}
    for checkpoint in models.values():
        check_hf_checkpoint(checkpoint)
        check_episode_format(checkpoint, config.episode)
    modes = [replace(EvalMode.parse(text), model=label) for label in models for text in config.modes]
    with open_run(config) as run:
        for selection in selections:
            if selection.missing.paths:
                run.progress.print_line(f"{selection.benchmark.title}: {selection.missing}; skipping their questions")
        jobs = [
            _EvalJob(selection, mode, _open_log(selection, mode, models[mode.model], config, run))
            for selection in selections
            for mode in modes
        ]
        if not all(job.complete for job in jobs):
            asyncio.run(_run_jobs(config, run, jobs, models))
        results = [
            BenchmarkResults(
                selection,
                {
                    job.mode: score_results(selection.benchmark, job.log.records)
                    for job in jobs
                    if job.selection is selection
                },
            )
            for selection in selections
        ]
        write_reports(config, run.run_dir.path, results)


def write_reports(config: EvalRunConfig, run_dir: Path, results: list[BenchmarkResults]) -> None:
    """Write result files, print tables, and draw a curve if there are several modes or models."""
    report = build_benchmark_results(results, config.eval, {MAIN_MODEL: config.model, **config.compare})
    write_benchmark_results(run_dir, report)
    for benchmark_results in results:
        write_samples(run_dir, benchmark_results)
    print_benchmark_results(report)
    print(f"results: {run_dir / 'benchmarks.json'}")
    if len(config.modes) > 1 or config.compare:
        write_curve(run_dir, report)
        print(f"curve: {write_curve_report(run_dir)}")


# -- loading ----------------------------------------------------------------------


def load_benchmarks(config: EvalRunConfig) -> list[BenchmarkSelection]:
    """Load every configured benchmark, check that its videos exist and that its answers can be scored.

    Raises:
        UserError: No benchmark is configured, a file is malformed, videos are missing without
            `allow_missing`, or a benchmark needs a judge and none is configured.
    """
    if not config.benchmarks:
        raise UserError("benchmarks is empty; use a config such as conf/eval/mlvu.yaml or set benchmarks.<name>")
    selections = [_load_selection(key, entry, config) for key, entry in config.benchmarks.items()]
    incomplete = [selection for selection in selections if selection.missing.paths]
    if incomplete and not config.allow_missing:
        lines = "; ".join(f"{selection.benchmark.title}: {selection.missing}" for selection in incomplete)
        raise UserError(f"{lines}. Set benchmarks.<name>.videos, or allow_missing=true to skip their questions")
    for selection in selections:
        title = selection.benchmark.title
        if not selection.tasks:
            raise UserError(f"{title}: 0 questions left to evaluate ({selection.missing})")
        check_videos(list(selection.tasks), title)
        check_scorers(config.reward, selection.tasks, title)
    return selections


def _load_selection(key: str, entry: BenchmarkConfig, config: EvalRunConfig) -> BenchmarkSelection:
    if not entry.annotations:
        raise UserError(f"benchmarks.{key}.annotations is empty; set it to the released file or its folder")

    def resolve(path: str) -> Path | None:
        return Path(config.data) / path if path else None

    annotations = Path(config.data) / entry.annotations
    files = BenchmarkFiles(
        annotations=annotations,
        video_dir=resolve(entry.videos) or (annotations if annotations.is_dir() else annotations.parent),
        answer_file=resolve(entry.answers),
        subtitle_dir=resolve(entry.subtitles),
        embedding_model_dir=resolve(entry.embedding_model),
        image_dir=image_cache_dir(config.image_cache_dir),
    )
    adapter = entry.adapter or key
    benchmark = load_benchmark(adapter, files)
    sampled_tasks = subsample(benchmark.tasks, entry.sampling_strategy, config.seed)
    missing = find_missing_videos(sampled_tasks)
    missing_paths = set(missing.paths)
    tasks = tuple(task for task in sampled_tasks if task.video not in missing_paths)
    return BenchmarkSelection(key, adapter, benchmark, tasks, missing)


def _open_log(
    selection: BenchmarkSelection, mode: EvalMode, model: str, config: EvalRunConfig, run: RunContext
) -> EvalLog:
    """Open the log of a benchmark and mode; it raises if it holds results of another evaluation."""
    lines = "".join(to_json_line(task_to_dict(task)) for task in selection.tasks)
    identity = {
        "model": model,
        "benchmark": selection.adapter,
        "questions": blake3(lines.encode()).hexdigest()[:16],
        "mode": str(mode),
        "episode": asdict(mode.episode_config(config.episode, config.uniform_prompt)),
    }
    return EvalLog(run.run_dir.path / "eval" / selection.key / f"{mode.stage}.jsonl", identity)


# -- running ----------------------------------------------------------------------


async def _run_jobs(config: EvalRunConfig, run: RunContext, jobs: list[_EvalJob], models: dict[str, str]) -> None:
    """Run incomplete jobs model by model; all models share the decode pool and the engine settings."""
    async with AsyncExitStack() as stack:
        with run.time_stage("start Ray"):
            await stack.enter_async_context(ray_cluster.checked_ray_cluster(config))
            pool = await stack.enter_async_context(runtime.decode_pool(config))
        for label, model in models.items():
            model_jobs = [job for job in jobs if job.mode.model == label and not job.complete]
            if model_jobs:
                await _run_model(model, model_jobs, pool, config, run)


async def _run_model(
    model: str, jobs: list[_EvalJob], pool: DecodePool, config: EvalRunConfig, run: RunContext
) -> None:
    async with AsyncExitStack() as stack:
        with run.time_stage("start engine"), run.progress.stage("start engine", 1) as stage:
            start = stack.enter_async_context(runtime.start_rollout(config, model, pool, run.run_dir))
            scheduler = await run.interrupt.run_interruptible(start)
            stage.advance()
        for job in jobs:
            name, tasks = f"{job.selection.key} {job.mode}", job.selection.tasks
            episode_config = job.mode.episode_config(config.episode, config.uniform_prompt)
            with run.time_stage(name), run.progress.stage(name, len(tasks)) as stage:
                evaluation = evaluate(
                    scheduler,
                    tasks,
                    job.log,
                    episode_config,
                    stage=job.mode.stage,
                    on_progress=stage.advance,
                )
                await run.interrupt.run_interruptible(evaluation)
