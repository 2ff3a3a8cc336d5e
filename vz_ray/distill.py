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

from vz_ray import actors
from vz_ray.coldstart.distill.account import Account
from vz_ray.coldstart.distill.card import Card, make_card, table
from vz_ray.coldstart.distill.chat import Guide
from vz_ray.coldstart.distill.curate import Curated, curate
from vz_ray.coldstart.distill.decontaminate import HeldOut, identity
from vz_ray.coldstart.distill.expert import Expert, LimitReached, api_key
from vz_ray.coldstart.distill.log import PlayLog
from vz_ray.coldstart.distill.publish import publish
from vz_ray.coldstart.distill.reflect import log_files, read_wrong
from vz_ray.coldstart.distill.studio import Job, Studio
from vz_ray.config import to_yaml
from vz_ray.config.distill import CurateConfig, DistillConfig, ExemplarConfig, ReflectConfig
from vz_ray.data.rl_file import check_videos, read_tasks
from vz_ray.desk import Desk
from vz_ray.episode.wire import WireFormat
from vz_ray.observe import logs, names
from vz_ray.observe.errors import UserError
from vz_ray.observe.interrupt import Interrupt
from vz_ray.observe.live import EPISODE
from vz_ray.observe.metrics import MetricLog
from vz_ray.observe.progress import Progress
from vz_ray.observe.run_dir import RunDir, write_atomic
from vz_ray.quickstart import wire_of
from vz_ray.reward import require_scorers
from vz_ray.watch.watch import Watch
from vz_ray.watch.watching import check_observers, watching

GOES_ON = "the same command goes on where it was, and pays for nothing twice"
EXPERT_NAMES = {"right": names.EXPERT_RIGHT, "failed": names.EXPERT_FAILED, "usd": names.EXPERT_USD}
"""What is shown while an expert plays, and what it is called in `metrics.jsonl`; `step` counts episodes."""


class CutShort(UserError):
    """The cost limit kept some episodes from being played.

    Attributes:
        card: Of the data set of those that were.
    """

    def __init__(self, why: str, limit_usd: float, card: Card) -> None:
        super().__init__(
            f"stopped at the cost limit with {card.played} of {card.planned} episodes played: {why}, "
            f"expert.limit_usd is {limit_usd:g}; raise it and run the same command to go on"
        )
        self.card = card


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be played.

    Attributes:
        stage: `exemplar` or `reflect`.
        jobs: Episodes.
        guide: What the expert alone is told.
        came_in: Counts of what the jobs were made from.
    """

    stage: str
    jobs: Sequence[Job]
    guide: Guide
    came_in: Mapping[str, int]


def run_exemplar(config: ExemplarConfig) -> None:
    """`vz-ray distill exemplar`: an expert plays tasks, right episodes are kept."""
    tasks = read_tasks(config.tasks)
    check_videos(tasks, config.tasks)
    require_scorers(config.reward, tasks, config.tasks)
    jobs = [Job(task, sample) for task in tasks for sample in range(config.attempts)]
    guide = Guide.load(config.expert.prompt)
    plan = Plan("exemplar", jobs, guide, {"tasks": len(tasks), "attempts at each": config.attempts})
    _run(config, plan, _wire(config))


def run_reflect(config: ReflectConfig) -> None:
    """`vz-ray distill reflect`: an expert corrects the policy, what it made right is kept."""
    wire = _wire(config)
    files = log_files(config.episodes)
    jobs, counts = read_wrong(files, wire.name, rounds=config.episode.max_rounds, most=config.wrong_per_task)
    if not jobs:
        found = ", ".join(f"{name} {count}" for name, count in counts.items()) or "no episodes"
        raise UserError(f"nothing to correct in {', '.join(config.episodes)}: {found}")
    tasks = list({job.task.task_id: job.task for job in jobs}.values())
    require_scorers(config.reward, tasks, files[0].name)
    _run(config, Plan("reflect", jobs, Guide.load(config.prompt), counts), wire)


def _wire(config: DistillConfig) -> WireFormat:
    if not Path(config.model).is_dir():
        raise UserError(f"no checkpoint directory at {config.model}: set model to the policy to be taught")
    return wire_of(config.model, config.episode)


def _run(config: DistillConfig, plan: Plan, wire: WireFormat) -> None:
    api_key(config.expert)
    check_observers(config.observe)
    held_out = _held_out(config.curate)
    try:
        with _opened(config) as at:
            card = asyncio.run(_distill(config, plan, wire, held_out, at))
    except CutShort as error:
        _show(config, error.card)
        raise
    _show(config, card)


def _show(config: DistillConfig, card: Card) -> None:
    Console().print(table(card))
    print(f"data set: {Path(config.runs) / config.name / 'dataset'}")


@contextmanager
def _opened(config: DistillConfig) -> Iterator[Desk]:
    """The run directory, held; limits and rules may be others than last time, the log says what may not."""
    run = RunDir(Path(config.runs) / config.name)
    try:
        run.episodes.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use {run.path} as run directory: {error.strerror or error}") from error
    with run.held(), Progress() as progress, Interrupt(then=GOES_ON) as interrupt:
        write_atomic(run.config, to_yaml(config).encode())
        badge = actors.badge_of(config)
        logs.configure(run.logs, badge=badge)
        yield Desk(run, progress, interrupt, badge)


async def _distill(config: DistillConfig, plan: Plan, wire: WireFormat, held_out: HeldOut, at: Desk) -> Card:
    """Plays what is left and writes the data set; returns its card.

    Raises:
        CutShort: Not all of it could be played; the data set is of what was.
    """
    run = at.run
    account = Account(run.path / "replies.jsonl", config.expert.limit_usd)
    log = PlayLog(run.episodes / f"{plan.stage}.jsonl", _identity(config, plan, wire))
    expert = Expert(config.expert, account, at.interrupt.check)
    if log.records or account.spent.requests:
        at.progress.say(f"going on with {run.path}: {_paid(account)}")
    async with (
        actors.cluster_of(config),
        actors.clip_pool(config) as frames,
        watching(config.observe, run, frames, unit=EPISODE) as watch,
    ):
        studio = Studio(expert, wire, frames, config.episode, config.reward, plan.guide, plan.stage)
        short = await _play(studio, plan.jobs, log, config.episodes_at_once, at, watch)
        watch.doing("export")
        curated = curate(
            log.records,
            config.curate,
            held_out,
            max_zoom_frames=config.episode.max_zoom_frames,
            seed=config.seed,
        )
        card = _card(config, plan, log, curated, account)
        with at.progress.stage("data set"):
            dataset = run.path / "dataset"
            await publish(dataset, curated.kept, curated.dropped, card, wire, frames, config.image)
        if short:
            raise CutShort(short, config.expert.limit_usd, card)
    return card


async def _play(
    studio: Studio, jobs: Sequence[Job], log: PlayLog, at_once: int, at: Desk, watch: Watch
) -> str:
    """Plays what the log does not hold; returns why not all of it, if the cost limit was in the way."""
    done = log.done
    watch.begun(sum(job.key in done for job in jobs), len(jobs))
    watch.doing("rollout")
    with (
        at.progress.stage(studio.stage, len(jobs)) as stage,
        MetricLog(at.run.metrics, at.run.path / "tensorboard", trackers=watch.trackers) as metrics,
    ):

        def advance(episodes: int) -> None:
            stage.advance(episodes)
            watch.stepped(stage.done)

        def show(values: Mapping[str, float]) -> None:
            at.progress.show(values)
            metrics.log(stage.done, {EXPERT_NAMES[name]: values[name] for name in EXPERT_NAMES})

        try:
            await studio.play_all(jobs, log, at_once=at_once, advance=advance, show=show)
        except LimitReached as error:
            return f"{error}, {_paid(studio.expert.account)}"
        finally:
            await studio.expert.close()
    return ""


def _card(config: DistillConfig, plan: Plan, log: PlayLog, curated: Curated, account: Account) -> Card:
    return make_card(
        f"{config.name}: {plan.stage}",
        config.expert.model,
        log.records,
        curated.kept,
        curated.dropped,
        account.spent,
        planned=len(plan.jobs),
        rates=curated.rates,
        came_in=plan.came_in,
        against=config.curate.against,
    )


def _paid(account: Account) -> str:
    spent = account.spent
    unsure = f" (and at most ${spent.unsure_usd:.4f} without a reply)" if spent.unsure_usd else ""
    return f"${spent.usd:.4f}{unsure} spent on {spent.replies} replies"


def _identity(config: DistillConfig, plan: Plan, wire: WireFormat) -> dict[str, Any]:
    """What makes episodes comparable: whoever plays, how it is written, what it may do, how it is scored."""
    expert = config.expert
    return {
        "stage": plan.stage,
        "expert": expert.model,
        "wire": wire.name,
        "guide": blake3(repr(plan.guide).encode()).hexdigest()[:16],
        "sampling": [expert.temperature, expert.top_p],
        "episode": asdict(config.episode),
        "reward": asdict(config.reward),
    }


def _held_out(config: CurateConfig) -> HeldOut:
    """The evaluation sets; their videos are read whole where they are there."""
    tasks = [task for path in config.against for task in read_tasks(path)]
    videos = [identity(uri) for uri in {task.video: None for task in tasks}]
    return HeldOut(videos, [task.question for task in tasks], config.ngram)
