"""Batches whose update was skipped because its loss or gradient was no finite number: kept, and played again.

    replay/step-000012/     the update that would have followed the twelfth; `-2`, `-3` for further tries
        batch.jsonl         its trajectories, a line each, as they stand in `episodes/*.jsonl`; no pixels
        step.json           what it was: see `SkippedUpdateMeta`, and the learner's settings
        model/              the weights it was skipped at, where training ended with it

`replay_update` takes the same step again, on one rank: with the same weights and frames the same comes out. Old
log-probs are computed anew from those weights, and are not those of an iteration's earlier updates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vz_ray.config.learner import LearnerConfig
from vz_ray.config.load import restore_config
from vz_ray.env.serialization import trajectory_from_dict, trajectory_to_dict
from vz_ray.env.trajectory import Group, Trajectory
from vz_ray.learner.distributed import RankInfo, fail_together
from vz_ray.utils.atomic_files import atomic_directory, write_atomic
from vz_ray.utils.errors import UserError
from vz_ray.utils.json_lines import read_complete_lines

if TYPE_CHECKING:
    from vz_ray.learner.batch import PixelLoader
    from vz_ray.video.frame import RGB

BATCH, STEP, MODEL = "batch.jsonl", "step.json", "model"


@dataclass(frozen=True, slots=True)
class SkippedUpdateMeta:
    """What a skipped update was.

    Attributes:
        kind: `sft` or `grpo`.
        step: Updates done before it.
        weight_version: Weight version that it was to start from, where there are versions.
        grad_norm: Over all ranks; DeepSpeed says inf also where it was NaN.
        world_size: Ranks that took part.
    """

    kind: str
    step: int
    weight_version: int | None
    grad_norm: float
    world_size: int


def save_skipped_batch(
    root: Path,
    trajectories: Sequence[Trajectory],
    facts: SkippedUpdateMeta,
    config: LearnerConfig,
    place: RankInfo,
) -> Path:
    """Writes a batch below `root`, complete or not at all; every rank must call. Returns its directory."""
    for attempt in count(1):
        directory = root / (f"step-{facts.step:06d}" + (f"-{attempt}" if attempt > 1 else ""))
        with fail_together(place, f"looking for {directory}"):
            taken = directory.exists()
        if not taken:
            break
    with fail_together(place, f"keeping {directory}"):
        if place.rank == 0:
            with atomic_directory(directory) as draft:
                # Python writes and reads NaN and Infinity, which may be just what was wrong.
                lines = [json.dumps(trajectory_to_dict(trajectory)) + "\n" for trajectory in trajectories]
                write_atomic(draft / BATCH, "".join(lines).encode())
                content = asdict(facts) | {"learner": asdict(config)}
                write_atomic(draft / STEP, json.dumps(content, indent=1).encode())
    return directory


def too_many_skips_error(count: int, kept: Path | None) -> UserError:
    """What ends training."""
    where = (
        f"the batch and the weights are in {kept}: see `vz-ray replay {kept}`" if kept else "none was kept"
    )
    return UserError(
        f"{count} updates in a row had a loss or gradient that was no finite number and were skipped "
        f"(learner.max_skipped_updates); {where}. A lower learner.optimizer.learning_rate or "
        "learner.optimizer.max_grad_norm may help, from the last checkpoint"
    )


@dataclass(frozen=True, slots=True)
class SkippedBatch:
    """A batch that was kept.

    Attributes:
        config: The learner's settings then.
        model: Its weights, where they were kept too.
    """

    meta: SkippedUpdateMeta
    trajectories: tuple[Trajectory, ...]
    config: LearnerConfig
    model: Path | None

    @classmethod
    def load(cls, directory: Path) -> SkippedBatch:
        """Reads what `keep_batch` wrote.

        Raises:
            UserError: It is no such directory.
        """
        try:
            content: dict[str, Any] = json.loads((directory / STEP).read_text())
            config = restore_config(LearnerConfig, content.pop("learner"))
            found = [trajectory_from_dict(line) for line in read_complete_lines(directory / BATCH)]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{directory} holds no batch of a skipped update: {error}") from error
        model = directory / MODEL
        return cls(SkippedUpdateMeta(**content), tuple(found), config, model if model.exists() else None)

    def groups(self) -> list[Group]:
        """The trajectories by iteration and task, in order."""
        by_task: dict[tuple[int, str], list[Trajectory]] = {}
        for trajectory in self.trajectories:
            by_task.setdefault((trajectory.id.step, trajectory.id.task_id), []).append(trajectory)
        return [Group(task, tuple(played)) for (_, task), played in by_task.items()]


def replay_update(
    kept: SkippedBatch, pixels: PixelLoader | Mapping[str, RGB], model: Path | str | None = None
) -> tuple[dict[str, float], list[str]]:
    """Takes a skipped update again, in this process alone; nothing is written.

    Args:
        pixels: Of its frames, as `Trainer` takes them.
        model: Checkpoint directory of the weights; without it those that were kept, or else those that
            training started from.

    Returns:
        The step's metrics, and the ids of trajectories with a log-prob that is no finite number.
    """
    from vz_ray.learner.trainer import Trainer

    at = str(model or kept.model or kept.config.model)
    # The weights kept are merged: adapters at 0 on them are the same policy.
    config = replace(
        kept.config, model=at, world_size=1, replay_dir="", max_skipped_updates=2, max_restarts=0
    )
    if config.reference_model is None:
        config = replace(config, reference_model=kept.config.model)
    groups = kept.groups()
    trainer = Trainer(replace(config, mini_batch_size=len(groups), epochs=1))
    rows = trainer.compute_logprobs(kept.trajectories, pixels)
    broken = [
        str(trajectory.id)
        for trajectory, row in zip(kept.trajectories, rows, strict=True)
        if not np.isfinite(row).all()
    ]
    if kept.meta.kind == "sft":
        return trainer.sft_step(kept.trajectories, pixels), broken
    return trainer.grpo_step(groups, pixels, kept.meta.weight_version), broken


def describe_replay(metrics: Mapping[str, float], broken: Sequence[str]) -> Iterator[str]:
    """A replay in words, a line each."""
    outcome = "skipped again" if metrics["skipped"] else "carried out: with these weights it is finite"
    yield f"the update was {outcome}"
    for name in ("loss", "grad_norm"):
        yield f"{name}: {metrics[name]:.6g}"
    finite = sum(math.isfinite(value) for value in metrics.values())
    yield f"{finite} of {len(metrics)} metrics are finite"
    for name in broken:
        yield f"trajectory {name} has log-probs that are no finite numbers"
