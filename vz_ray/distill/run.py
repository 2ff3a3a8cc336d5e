"""Trajectories from an expert, from nothing to a data set; resumable at any point.

    exemplar   tasks                      -> the expert plays each several times      -> curate -> dataset/
    reflect    the policy's wrong zooms   -> the expert takes over after the last one -> curate -> dataset/

A run leaves `replies.jsonl` (what was paid for), `episodes/`, `metrics.jsonl`, and `dataset/`
with its card. The data set is made anew from the episodes each time.
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
from vz_ray.data.sft_data import load_chat_format
from vz_ray.data.task_file import check_videos, read_tasks
from vz_ray.distill.chat_messages import TeacherPrompt
from vz_ray.distill.cost_ledger import CostLedger
from vz_ray.distill.curation import CurationResult, curate
from vz_ray.distill.data_card import DataCard, build_data_card, to_table
from vz_ray.distill.dataset_writer import write_dataset
from vz_ray.distill.decontamination import HeldOutSets, identify_video
from vz_ray.distill.distillation_log import DistillationLog
from vz_ray.distill.reflection import find_episode_logs, load_reflection_jobs
from vz_ray.distill.teacher_client import CostLimitReached, TeacherClient, teacher_api_key
from vz_ray.distill.teacher_runner import TeacherJob, TeacherRunner
from vz_ray.env.chat_format import ChatFormat
from vz_ray.monitoring import logging_config, metric_names
from vz_ray.monitoring.live_status import RunKind
from vz_ray.monitoring.metric_logger import MetricLogger
from vz_ray.monitoring.progress import Progress
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.rewards import check_scorers
from vz_ray.runtime import runtime
from vz_ray.runtime.monitor_run import check_monitoring, monitor_run
from vz_ray.runtime.run_context import RunContext
from vz_ray.runtime.run_monitor import RunMonitor
from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import Interrupt

RESUME_HINT = "the same command goes on where it was, and pays for nothing twice"
TEACHER_METRICS = {
    "right": metric_names.TEACHER_CORRECT_RATE,
    "failed": metric_names.TEACHER_FAILED_RATE,
    "usd": metric_names.TEACHER_COST_USD,
}
"""What is shown while an expert plays, and what it is called in `metrics.jsonl`; `step` counts episodes."""


class CostLimitExceeded(UserError):
    """The cost limit kept some episodes from being played.

    Attributes:
        card: Of the data set of those that were.
    """

    def __init__(self, why: str, limit_usd: float, card: DataCard) -> None:
        super().__init__(
            f"stopped at the cost limit with {card.num_episodes} of {card.planned} episodes played: {why}, "
            f"teacher.max_cost_usd is {limit_usd:g}; raise it and run the same command to go on"
        )
        self.card = card


@dataclass(frozen=True, slots=True)
class DistillationPlan:
    """What is to be played.

    Attributes:
        stage: `exemplar` or `reflect`.
        jobs: Episodes.
        prompt: What the expert alone is told.
        inputs: Counts of what the jobs were made from.
    """

    stage: str
    jobs: Sequence[TeacherJob]
    prompt: TeacherPrompt
    inputs: Mapping[str, int]


def run_exemplar_distillation(config: ExemplarRunConfig) -> None:
    """`vz-ray distill exemplar`: an expert plays tasks, right episodes are kept."""
    tasks = read_tasks(config.tasks)
    check_videos(tasks, config.tasks)
    check_scorers(config.reward, tasks, config.tasks)
    jobs = [TeacherJob(task, sample) for task in tasks for sample in range(config.attempts_per_task)]
    guide = TeacherPrompt.load(config.teacher.prompt)
    plan = DistillationPlan(
        "exemplar", jobs, guide, {"tasks": len(tasks), "attempts at each": config.attempts_per_task}
    )
    _run(config, plan, _wire(config))


def run_reflection_distillation(config: ReflectionRunConfig) -> None:
    """`vz-ray distill reflect`: an expert corrects the policy, what it made right is kept."""
    wire = _wire(config)
    files = find_episode_logs(config.episodes)
    jobs, counts = load_reflection_jobs(
        files, wire.name, max_rounds=config.episode.max_rounds, max_per_task=config.max_wrong_per_task
    )
    if not jobs:
        found = ", ".join(f"{name} {count}" for name, count in counts.items()) or "no episodes"
        raise UserError(f"nothing to correct in {', '.join(config.episodes)}: {found}")
    tasks = list({job.task.task_id: job.task for job in jobs}.values())
    check_scorers(config.reward, tasks, files[0].name)
    _run(config, DistillationPlan("reflect", jobs, TeacherPrompt.load(config.prompt), counts), wire)


def _wire(config: DistillRunConfig) -> ChatFormat:
    if not Path(config.model).is_dir():
        raise UserError(f"no checkpoint directory at {config.model}: set model to the policy to be taught")
    return load_chat_format(config.model, config.episode)


def _run(config: DistillRunConfig, plan: DistillationPlan, wire: ChatFormat) -> None:
    teacher_api_key(config.teacher)
    check_monitoring(config.monitoring)
    held_out = _held_out(config.filter)
    try:
        with _opened(config) as at:
            card = asyncio.run(_distill(config, plan, wire, held_out, at))
    except CostLimitExceeded as error:
        _show(config, error.card)
        raise
    _show(config, card)


def _show(config: DistillRunConfig, card: DataCard) -> None:
    Console().print(to_table(card))
    print(f"data set: {Path(config.runs) / config.name / 'dataset'}")


@contextmanager
def _opened(config: DistillRunConfig) -> Iterator[RunContext]:
    """The run directory, held; limits and rules may be others than last time, the log says what may not."""
    run = RunDir(Path(config.runs) / config.name)
    try:
        run.episodes.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use {run.path} as run directory: {error.strerror or error}") from error
    with run.lock(), Progress() as progress, Interrupt(resume_hint=RESUME_HINT) as interrupt:
        write_atomic(run.config, to_yaml(config).encode())
        badge = runtime.run_identity(config)
        logging_config.configure_logging(run.logs, identity=badge)
        yield RunContext(run, progress, interrupt, badge)


async def _distill(
    config: DistillRunConfig, plan: DistillationPlan, wire: ChatFormat, held_out: HeldOutSets, at: RunContext
) -> DataCard:
    """Plays what is left and writes the data set; returns its card.

    Raises:
        CutShort: Not all of it could be played; the data set is of what was.
    """
    run = at.run_dir
    account = CostLedger(run.path / "replies.jsonl", config.teacher.max_cost_usd)
    log = DistillationLog(run.episodes / f"{plan.stage}.jsonl", _identity(config, plan, wire))
    expert = TeacherClient(config.teacher, account, at.interrupt.raise_if_requested)
    if log.records or account.totals.requests:
        at.progress.print_line(f"going on with {run.path}: {_paid(account)}")
    async with (
        runtime.checked_ray_cluster(config),
        runtime.decode_pool(config) as frames,
        monitor_run(config.monitoring, run, frames, run_kind=RunKind.DISTILL) as watch,
    ):
        studio = TeacherRunner(expert, wire, frames, config.episode, config.reward, plan.prompt, plan.stage)
        short = await _play(studio, plan.jobs, log, config.max_concurrent_episodes, at, watch)
        watch.on_phase("export")
        curated = curate(
            log.records,
            config.filter,
            held_out,
            max_zoom_frames=config.episode.max_zoom_frames,
            seed=config.seed,
        )
        card = _card(config, plan, log, curated, account)
        with at.progress.stage("data set"):
            dataset = run.path / "dataset"
            await write_dataset(
                dataset, curated.kept, curated.dropped, card, wire, frames, config.image_format
            )
        if short:
            raise CostLimitExceeded(short, config.teacher.max_cost_usd, card)
    return card


async def _play(
    studio: TeacherRunner,
    jobs: Sequence[TeacherJob],
    log: DistillationLog,
    at_once: int,
    at: RunContext,
    watch: RunMonitor,
) -> str:
    """Plays what the log does not hold; returns why not all of it, if the cost limit was in the way."""
    done = log.completed
    watch.on_start(sum(job.key in done for job in jobs), len(jobs))
    watch.on_phase("rollout")
    with (
        at.progress.stage(studio.stage, len(jobs)) as stage,
        MetricLogger(at.run_dir.metrics, at.run_dir.path / "tensorboard", trackers=watch.trackers) as metrics,
    ):

        def advance(episodes: int) -> None:
            stage.advance(episodes)
            watch.on_progress(stage.done)

        def show(values: Mapping[str, float]) -> None:
            at.progress.show_metrics(values)
            metrics.log(stage.done, {TEACHER_METRICS[name]: values[name] for name in TEACHER_METRICS})

        try:
            await studio.run_jobs(jobs, log, max_concurrent=at_once, advance=advance, report=show)
        except CostLimitReached as error:
            return f"{error}, {_paid(studio.teacher.ledger)}"
        finally:
            await studio.teacher.close()
    return ""


def _card(
    config: DistillRunConfig,
    plan: DistillationPlan,
    log: DistillationLog,
    curated: CurationResult,
    account: CostLedger,
) -> DataCard:
    return build_data_card(
        f"{config.name}: {plan.stage}",
        config.teacher.model,
        log.records,
        curated.kept,
        curated.dropped,
        account.totals,
        planned=len(plan.jobs),
        pass_rates=curated.pass_rates,
        inputs=plan.inputs,
        held_out=config.filter.held_out,
    )


def _paid(account: CostLedger) -> str:
    spent = account.totals
    unsure = f" (and at most ${spent.reserved_usd:.4f} without a reply)" if spent.reserved_usd else ""
    return f"${spent.cost_usd:.4f}{unsure} spent on {spent.replies} replies"


def _identity(config: DistillRunConfig, plan: DistillationPlan, wire: ChatFormat) -> dict[str, Any]:
    """What makes episodes comparable: whoever plays, how it is written, what it may do, how it is scored."""
    expert = config.teacher
    return {
        "stage": plan.stage,
        "expert": expert.model,
        "wire": wire.name,
        "guide": blake3(repr(plan.prompt).encode()).hexdigest()[:16],
        "sampling": [expert.temperature, expert.top_p],
        "episode": asdict(config.episode),
        "reward": asdict(config.reward),
    }


def _held_out(config: FilterConfig) -> HeldOutSets:
    """The evaluation sets; their videos are read whole where they are there."""
    tasks = [task for path in config.held_out for task in read_tasks(path)]
    videos = [identify_video(uri) for uri in {task.video: None for task in tasks}]
    return HeldOutSets(videos, [task.question for task in tasks], config.ngram_size)
