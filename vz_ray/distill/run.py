"""Distillation runs, resumable at any point.

    exemplar   tasks                       -> several teacher attempts per task         -> filters -> dataset/
    reflect    the policy's wrong episodes -> the teacher continues after the last zoom -> filters -> dataset/

A run directory contains `replies.jsonl` (cost ledger), `episodes/`, `metrics.jsonl` and `dataset/` with its
data card. The data set is rebuilt from the episodes at the end of each run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3
from rich.console import Console

from vz_ray.config import to_yaml
from vz_ray.config.distill import DistillRunConfig, ExemplarRunConfig, FilterConfig, ReflectionRunConfig
from vz_ray.data.chat_format_loader import load_chat_format
from vz_ray.data.task_file import check_videos, read_tasks
from vz_ray.distill.chat_messages import TeacherPrompt
from vz_ray.distill.cost_ledger import CostLedger
from vz_ray.distill.dataset import DataCard, build_data_card, to_table, write_dataset
from vz_ray.distill.decontamination import HeldOutSets, identify_video
from vz_ray.distill.filters import CurationResult, curate
from vz_ray.distill.reflection import find_episode_logs, load_reflection_jobs
from vz_ray.distill.teacher_client import CostLimitReached, TeacherClient, teacher_api_key
from vz_ray.distill.teacher_runner import DistillationLog, TeacherJob, TeacherRunner
from vz_ray.env.chat_format import ChatFormat
from vz_ray.monitoring import logging_config, metric_names
from vz_ray.monitoring.live_status import RunKind
from vz_ray.monitoring.metric_logger import MetricLogger
from vz_ray.monitoring.progress import Progress
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.rewards import check_choices, check_scorers
from vz_ray.runtime import ray_cluster, runtime
from vz_ray.runtime.monitor_run import check_monitoring, monitor_run
from vz_ray.runtime.run_context import RunContext
from vz_ray.runtime.run_monitor import RunMonitor
from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import Interrupt

RESUME_HINT = "run the same command to resume; paid replies are reused"
TEACHER_METRICS = {
    "correct": metric_names.TEACHER_CORRECT_RATE,
    "failed": metric_names.TEACHER_FAILED_RATE,
    "usd": metric_names.TEACHER_COST_USD,
}
"""Statistics of the teacher runner and their names in `metrics.jsonl`. The step is the number of episodes."""


class CostLimitExceeded(UserError):
    """The budget ended the run before all episodes.

    Attributes:
        card: Data card of the data set from the finished episodes.
    """

    def __init__(self, reason: str, max_cost_usd: float, card: DataCard) -> None:
        super().__init__(
            f"teacher.max_cost_usd is {max_cost_usd:g}; the budget ended the run after {card.num_episodes} "
            f"of {card.planned} episodes ({reason}). Raise it and run the same command to resume."
        )
        self.card = card


@dataclass(frozen=True, slots=True)
class DistillationPlan:
    """Episodes of a distillation run.

    Attributes:
        stage: `exemplar` or `reflect`.
        jobs: Episodes to run.
        prompt: Additional instructions for the teacher.
        inputs: Counts of the inputs, for the data card.
    """

    stage: str
    jobs: Sequence[TeacherJob]
    prompt: TeacherPrompt
    inputs: Mapping[str, int]


def run_exemplar_distillation(config: ExemplarRunConfig) -> None:
    """Run `vz-ray distill exemplar`: the teacher attempts tasks; correct episodes are kept."""
    tasks = read_tasks(config.tasks)
    check_videos(tasks, config.tasks)
    check_scorers(config.reward, tasks, config.tasks)
    check_choices(tasks, config.tasks)
    jobs = [TeacherJob(task, sample) for task in tasks for sample in range(config.attempts_per_task)]
    inputs = {"tasks": len(tasks), "attempts per task": config.attempts_per_task}
    plan = DistillationPlan("exemplar", jobs, TeacherPrompt.load(config.teacher.prompt), inputs)
    _run(config, plan, _load_chat_format(config))


def run_reflection_distillation(config: ReflectionRunConfig) -> None:
    """Run `vz-ray distill reflect`: the teacher corrects wrong episodes; correct results are kept."""
    chat_format = _load_chat_format(config)
    files = find_episode_logs(config.episodes)
    jobs, counts = load_reflection_jobs(
        files,
        chat_format.name,
        max_rounds=config.episode.max_rounds,
        max_per_task=config.max_wrong_per_task,
    )
    if not jobs:
        reasons = ", ".join(f"{name} {count}" for name, count in counts.items()) or "no episodes"
        raise UserError(f"episodes is {', '.join(config.episodes)}; nothing to correct there: {reasons}")
    tasks = list({job.task.task_id: job.task for job in jobs}.values())
    check_scorers(config.reward, tasks, files[0].name)
    _run(config, DistillationPlan("reflect", jobs, TeacherPrompt.load(config.prompt), counts), chat_format)


def _load_chat_format(config: DistillRunConfig) -> ChatFormat:
    if not Path(config.model).is_dir():
        raise UserError(
            f"model is {config.model}; it must be the checkpoint directory of the policy that will be trained"
        )
    return load_chat_format(config.model, config.episode)


def _run(config: DistillRunConfig, plan: DistillationPlan, chat_format: ChatFormat) -> None:
    teacher_api_key(config.teacher)
    check_monitoring(config.monitoring)
    held_out = _load_held_out(config.filter)
    try:
        with _open_run(config) as run:
            card = asyncio.run(_distill(config, plan, chat_format, held_out, run))
    except CostLimitExceeded as error:
        _print_card(config, error.card)
        raise
    _print_card(config, card)


def _print_card(config: DistillRunConfig, card: DataCard) -> None:
    Console().print(to_table(card))
    print(f"data set: {Path(config.runs) / config.name / 'dataset'}")


@contextmanager
def _open_run(config: DistillRunConfig) -> Iterator[RunContext]:
    """Create or resume the run directory and hold its lock.

    Limits and filters may change on resume. The episode log rejects all other changes.
    """
    run_dir = RunDir(Path(config.runs) / config.name)
    try:
        run_dir.episodes.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use {run_dir.path} as run directory: {error.strerror or error}") from error
    with run_dir.lock(), Progress() as progress, Interrupt(resume_hint=RESUME_HINT) as interrupt:
        write_atomic(run_dir.config, to_yaml(config).encode())
        identity = runtime.run_identity(config)
        logging_config.configure_logging(run_dir.logs, identity=identity)
        yield RunContext(run_dir, progress, interrupt, identity)


async def _distill(
    config: DistillRunConfig,
    plan: DistillationPlan,
    chat_format: ChatFormat,
    held_out: HeldOutSets,
    run: RunContext,
) -> DataCard:
    """Run the remaining episodes and write the data set.

    Raises:
        CostLimitExceeded: The budget ended the run. The data set contains the finished episodes.
    """
    run_dir = run.run_dir
    ledger = CostLedger(run_dir.path / "replies.jsonl", config.teacher.max_cost_usd)
    log = DistillationLog(run_dir.episodes / f"{plan.stage}.jsonl", _log_identity(config, plan, chat_format))
    teacher = TeacherClient(config.teacher, ledger, run.interrupt.raise_if_requested)
    if log.records or ledger.totals.requests:
        run.progress.print_line(f"resuming {run_dir.path}: {_format_cost(ledger)}")
    async with (
        ray_cluster.checked_ray_cluster(config),
        runtime.decode_pool(config) as frames,
        monitor_run(config.monitoring, run_dir, frames, run_kind=RunKind.DISTILL) as monitor,
    ):
        runner = TeacherRunner(teacher, chat_format, frames, config.episode, config.reward, plan.prompt, plan.stage)
        limit_reason = await _run_jobs(runner, plan.jobs, log, config.max_concurrent_episodes, run, monitor)
        monitor.on_phase("export")
        curated = curate(
            log.records,
            config.filter,
            held_out,
            max_zoom_frames=config.episode.max_zoom_frames,
            seed=config.seed,
        )
        card = _build_card(config, plan, log, curated, ledger)
        with run.progress.stage("data set"):
            await write_dataset(run_dir.path / "dataset", curated, card, chat_format, frames, config.image_format)
        if limit_reason:
            raise CostLimitExceeded(limit_reason, config.teacher.max_cost_usd, card)
    return card


async def _run_jobs(
    runner: TeacherRunner,
    jobs: Sequence[TeacherJob],
    log: DistillationLog,
    max_concurrent: int,
    run: RunContext,
    monitor: RunMonitor,
) -> str:
    """Run the remaining jobs; return the reason if the budget stopped them, else an empty string."""
    completed = log.completed
    monitor.on_start(sum(job.key in completed for job in jobs), len(jobs))
    monitor.on_phase("rollout")
    run_dir = run.run_dir
    with (
        run.progress.stage(runner.stage, len(jobs)) as stage,
        MetricLogger(run_dir.metrics, run_dir.path / "tensorboard", trackers=monitor.trackers) as metrics,
    ):

        def advance(episodes: int) -> None:
            stage.advance(episodes)
            monitor.on_progress(stage.done)

        def report(values: Mapping[str, float]) -> None:
            run.progress.show_metrics(values)
            row = {metric: values[name] for name, metric in TEACHER_METRICS.items()}
            metrics.log(stage.done, row)
            monitor.on_progress(stage.done, row)

        try:
            await runner.run_jobs(jobs, log, max_concurrent=max_concurrent, advance=advance, report=report)
        except CostLimitReached as error:
            return f"{error}, {_format_cost(runner.teacher.ledger)}"
        finally:
            await runner.teacher.close()
    return ""


def _build_card(
    config: DistillRunConfig,
    plan: DistillationPlan,
    log: DistillationLog,
    curated: CurationResult,
    ledger: CostLedger,
) -> DataCard:
    return build_data_card(
        f"{config.name}: {plan.stage}",
        config.teacher.model,
        log.records,
        curated,
        ledger.totals,
        planned=len(plan.jobs),
        inputs=plan.inputs,
        held_out=config.filter.held_out,
    )


def _format_cost(ledger: CostLedger) -> str:
    totals = ledger.totals
    reserved = f" (and at most ${totals.reserved_usd:.4f} without a reply)" if totals.reserved_usd else ""
    return f"${totals.cost_usd:.4f}{reserved} spent on {totals.replies} replies"


def _log_identity(config: DistillRunConfig, plan: DistillationPlan, chat_format: ChatFormat) -> dict[str, Any]:
    """Return the settings that all episodes of one log must share."""
    teacher = config.teacher
    return {
        "stage": plan.stage,
        "teacher": teacher.model,
        "chat_format": chat_format.name,
        "prompt": blake3(repr(plan.prompt).encode()).hexdigest()[:16],
        "sampling": [teacher.temperature, teacher.top_p],
        "episode": asdict(config.episode),
        "reward": asdict(config.reward),
    }


def _load_held_out(config: FilterConfig) -> HeldOutSets:
    """Load the held-out evaluation sets and hash their local videos."""
    tasks = [task for path in config.held_out for task in read_tasks(path)]
    videos = [identify_video(uri) for uri in {task.video: None for task in tasks}]
    return HeldOutSets(videos, [task.question for task in tasks], config.ngram_size)
