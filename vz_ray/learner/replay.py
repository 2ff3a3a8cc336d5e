"""Batches of updates that were skipped for a non-finite loss or gradient: saved, and replayed for diagnosis.

    replay/step-000012/     the update after step 12; `-2`, `-3` for later attempts
        batch.jsonl         one trajectory per line, in the format of `episodes/*.jsonl`; no pixels
        step.json           `SkippedUpdateMeta` and the learner's config
        model/              the weights before the update, if it ended training

`replay_update` repeats the step on one rank; equal weights and frames give equal results. Old log-probs are
recomputed from these weights, which differ from those of earlier updates of the same step.
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
    from vz_ray.learner.image_inputs import PixelLoader
    from vz_ray.video.frame import RGB

BATCH, STEP, MODEL = "batch.jsonl", "step.json", "model"


@dataclass(frozen=True, slots=True)
class SkippedUpdateMeta:
    """Metadata of a skipped update.

    Attributes:
        kind: `sft` or `grpo`.
        step: Applied updates before it.
        weight_version: Weight version before it; None without versions.
        grad_norm: Global gradient norm; DeepSpeed reports inf also for NaN.
        world_size: Number of ranks.
    """

    kind: str
    step: int
    weight_version: int | None
    grad_norm: float
    world_size: int


def save_skipped_batch(
    root: Path,
    trajectories: Sequence[Trajectory],
    meta: SkippedUpdateMeta,
    config: LearnerConfig,
    rank_info: RankInfo,
) -> Path:
    """Write a batch below `root` atomically; every rank must call. Return its directory."""
    for attempt in count(1):
        directory = root / (f"step-{meta.step:06d}" + (f"-{attempt}" if attempt > 1 else ""))
        with fail_together(rank_info, f"checking {directory}"):
            exists = directory.exists()
        if not exists:
            break
    with fail_together(rank_info, f"writing {directory}"):
        if rank_info.rank == 0:
            with atomic_directory(directory) as staging:
                # Python's JSON keeps NaN and Infinity, which can be the cause of the failure.
                lines = [json.dumps(trajectory_to_dict(trajectory)) + "\n" for trajectory in trajectories]
                write_atomic(staging / BATCH, "".join(lines).encode())
                content = asdict(meta) | {"learner": asdict(config)}
                write_atomic(staging / STEP, json.dumps(content, indent=1).encode())
    return directory


def too_many_skips_error(consecutive_skips: int, saved_batch: Path | None) -> UserError:
    """Return the error that ends training."""
    batch = (
        f"The batch and the weights are in {saved_batch}; see `vz-ray replay {saved_batch}`."
        if saved_batch
        else "No batch was saved."
    )
    return UserError(
        f"{consecutive_skips} updates in a row were skipped for a non-finite loss or gradient "
        f"(learner.max_skipped_updates). {batch} Resume from the last checkpoint with a lower "
        "learner.optimizer.learning_rate or learner.optimizer.max_grad_norm."
    )


@dataclass(frozen=True, slots=True)
class SkippedBatch:
    """A saved batch.

    Attributes:
        config: The learner's config at that time.
        model: The weights before the update; None if they were not saved.
    """

    meta: SkippedUpdateMeta
    trajectories: tuple[Trajectory, ...]
    config: LearnerConfig
    model: Path | None

    @classmethod
    def load(cls, directory: Path) -> SkippedBatch:
        """Read the output of `save_skipped_batch`.

        Raises:
            UserError: `directory` holds no saved batch.
        """
        try:
            content: dict[str, Any] = json.loads((directory / STEP).read_text())
            config = restore_config(LearnerConfig, content.pop("learner"))
            trajectories = [trajectory_from_dict(line) for line in read_complete_lines(directory / BATCH)]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{directory} holds no batch of a skipped update: {error}") from error
        model = directory / MODEL
        return cls(SkippedUpdateMeta(**content), tuple(trajectories), config, model if model.exists() else None)

    def groups(self) -> list[Group]:
        """Return the trajectories grouped by step and task, in order."""
        by_task: dict[tuple[int, str], list[Trajectory]] = {}
        for trajectory in self.trajectories:
            by_task.setdefault((trajectory.id.step, trajectory.id.task_id), []).append(trajectory)
        return [Group(task_id, tuple(trajectories)) for (_, task_id), trajectories in by_task.items()]


def replay_update(
    batch: SkippedBatch, pixels: PixelLoader | Mapping[str, RGB], model: Path | str | None = None
) -> tuple[dict[str, float], list[str]]:
    """Repeat a skipped update in this process; nothing is written.

    Args:
        pixels: Pixels of the frames, as in `Trainer`.
        model: Checkpoint directory; default is the saved weights, or else the initial model of the run.

    Returns:
        The metrics of the step, and the ids of trajectories with non-finite log-probs.
    """
    from vz_ray.learner.trainer import Trainer

    config = replace(
        batch.config,
        model=str(model or batch.model or batch.config.model),
        world_size=1,
        sequence_parallel_size=1,
        replay_dir="",
        max_skipped_updates=2,
        max_restarts=0,
    )
    # Saved weights are merged: zero adapters on them give the same policy.
    if config.reference_model is None:
        config = replace(config, reference_model=batch.config.model)
    groups = batch.groups()
    trainer = Trainer(replace(config, mini_batch_size=len(groups), epochs=1))
    logprobs = trainer.compute_logprobs(batch.trajectories, pixels)
    non_finite = [
        str(trajectory.id)
        for trajectory, values in zip(batch.trajectories, logprobs, strict=True)
        if not np.isfinite(values).all()
    ]
    if batch.meta.kind == "sft":
        return trainer.sft_step(batch.trajectories, pixels), non_finite
    return trainer.grpo_step(groups, pixels, batch.meta.weight_version), non_finite


def describe_replay(metrics: Mapping[str, float], non_finite: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a report on a replayed update."""
    if metrics["skipped"]:
        yield "The update was skipped again."
    else:
        yield "The update was applied: loss and gradient are finite with these weights."
    for name in ("loss", "grad_norm"):
        yield f"{name}: {metrics[name]:.6g}"
    num_finite = sum(math.isfinite(value) for value in metrics.values())
    yield f"{num_finite} of {len(metrics)} metrics are finite"
    for name in non_finite:
        yield f"trajectory {name} has non-finite log-probs"
