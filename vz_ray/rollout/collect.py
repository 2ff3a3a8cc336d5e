"""Fills a batch with groups worth learning from: dynamic sampling, while others still play."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from vz_ray.data.cursor import IterationTasks
from vz_ray.data.task import Task
from vz_ray.episode.trajectory import Group, Sampling
from vz_ray.rollout.fleet import Fleet
from vz_ray.rollout.ledger import Ledger


@dataclass
class Batch:
    """One iteration's groups.

    Attributes:
        kept: Groups to learn from, in the order in which they finished.
        played: Every group with its task, those dropped too.
    """

    kept: list[Group] = field(default_factory=list)
    played: list[tuple[Task, Group]] = field(default_factory=list)


async def collect(
    fleet: Fleet,
    source: IterationTasks,
    ledger: Ledger,
    *,
    iteration: int,
    tasks: int,
    max_tasks: int,
    samples: int,
    sampling: Sampling,
    keep: Callable[[Group], bool],
    spare: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> Batch:
    """Plays tasks until `tasks` groups are kept, or `max_tasks` have been played.

    A group that is dropped is replaced by the next task at once, so that
    engines do not wait for the slowest group of a round.

    Args:
        fleet: Who plays.
        source: Where tasks come from.
        ledger: Keeps account of every sample.
        iteration: Names the episodes.
        tasks: Groups to keep.
        max_tasks: Most groups to play.
        samples: Trajectories in a group.
        sampling: How they are drawn.
        keep: Whether a group is worth learning from.
        spare: Further samples of each group; see `Fleet.play_group`.
        advance: Called with the number of groups kept since the last call.
    """
    batch, playing = Batch(), set[asyncio.Task[tuple[Task, Group]]]()

    def refill() -> None:
        wanted = min(tasks - len(batch.kept) - len(playing), min(max_tasks, source.all) - source.given)
        for task in source.take(max(0, wanted)):
            playing.add(asyncio.create_task(_play(fleet, task, samples, spare, sampling, ledger, iteration)))

    try:
        refill()
        while playing:
            done, left = await asyncio.wait(playing, return_when=asyncio.FIRST_COMPLETED)
            playing.clear()
            playing.update(left)
            for finished in done:
                task, group = finished.result()
                batch.played.append((task, group))
                if keep(group):
                    batch.kept.append(group)
                    advance(1)
            refill()
    finally:
        for unfinished in playing:
            unfinished.cancel()
        await asyncio.gather(*playing, return_exceptions=True)
    return batch


async def _play(
    fleet: Fleet,
    task: Task,
    samples: int,
    spare: int,
    sampling: Sampling,
    ledger: Ledger,
    iteration: int,
) -> tuple[Task, Group]:
    group = await fleet.play_group(task, samples, sampling, ledger, iteration=iteration, spare=spare)
    return task, group
