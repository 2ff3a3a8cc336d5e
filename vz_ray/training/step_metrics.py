"""Checks, episode records and metrics of one RL step."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest

from vz_ray.config.run import GrpoRunConfig
from vz_ray.data.episode_record import EpisodeRecord
from vz_ray.env.trajectory import EpisodeStatus
from vz_ray.learner.advantages import outcome_advantages
from vz_ray.monitoring import metric_names
from vz_ray.rollout.batch_collector import RolloutBatch
from vz_ray.rollout.batch_prefetcher import staleness_histogram
from vz_ray.runtime.runtime import Runtime
from vz_ray.training.state import TrainingState
from vz_ray.utils.errors import UserError
from vz_ray.weight_sync import PublishReport

LEARNER_METRICS = {
    "loss": metric_names.LOSS,
    "entropy": metric_names.ENTROPY,
    "entropy_coef": metric_names.ENTROPY_COEF,
    "kl": metric_names.KL_TO_REFERENCE,
    "teacher_kl": metric_names.TEACHER_KL,
    "grad_norm": metric_names.GRAD_NORM,
    "skipped": metric_names.SKIPPED_UPDATES,
    "mismatch_abs_max": metric_names.MISMATCH_LOGPROB_MAX,
    "mismatch_kl": metric_names.MISMATCH_KL,
    "mismatch_abs_max_after_image": "mismatch/logprob_abs_max_after_image",
    "mismatch_kl_after_image": metric_names.MISMATCH_KL_IMAGE,
    "mismatch_abs_max_after_text": "mismatch/logprob_abs_max_after_text",
    "mismatch_kl_after_text": metric_names.MISMATCH_KL_TEXT,
    "mismatch_sequence_abs_mean": metric_names.MISMATCH_SEQUENCE_MEAN,
    "mismatch_sequence_abs_max": metric_names.MISMATCH_SEQUENCE_MAX,
    "mismatch_sequence_outlier_rate": metric_names.MISMATCH_SEQUENCE_OUTLIERS,
    "truncated_weight_rate": metric_names.TRUNCATED_WEIGHTS,
    "rejected_token_rate": metric_names.REJECTED_TOKENS,
    "rejected_trajectory_rate": metric_names.REJECTED_TRAJECTORIES,
    "mismatch_abs_max_stale": "staleness/logprob_abs_max",
    "mismatch_kl_stale": "staleness/kl",
}
"""Metric names of the learner's values; other values are logged as `learner/<name>`."""


def episode_records(batch: RolloutBatch, step: int, config: GrpoRunConfig) -> list[EpisodeRecord]:
    """Return a record of every sampled episode; records of kept groups include the advantage."""
    kept_groups = {id(group) for group in batch.kept}
    records = []
    for task, group in batch.sampled:
        advantages: list[float] = []
        if id(group) in kept_groups and len(group.rewards) == len(group.trajectories):
            advantages = outcome_advantages(group, config.learner.loss).tolist()
        records += [
            EpisodeRecord(task, trajectory, "train", step, advantage)
            for trajectory, advantage in zip_longest(group.trajectories, advantages)
        ]
    return records


def check_batch(batch: RolloutBatch, *, rewards_needed: bool = True) -> None:
    """Check that an episode of the batch succeeded and was scored; otherwise the next batch would fail too.

    Args:
        rewards_needed: Whether the loss uses the rewards.

    Raises:
        UserError: All episodes failed, or none was scored.
    """
    trajectories = [trajectory for _, group in batch.sampled for trajectory in group.trajectories]
    if all(trajectory.status is EpisodeStatus.FAILED for trajectory in trajectories):
        raise UserError(
            f"all {len(trajectories)} episodes of the step failed; the first error: {trajectories[0].error}"
        )
    rewards = [trajectory.reward for trajectory in trajectories if trajectory.reward is not None]
    if rewards_needed and rewards and not any(reward.valid for reward in rewards):
        raise UserError(
            f"all {len(rewards)} scored episodes of the step are invalid; the last reason: {rewards[-1].note}"
        )


def check_teacher(batch: RolloutBatch, runtime: Runtime) -> None:
    """Check that the teacher, if there is one, scored a group of the batch.

    Raises:
        UserError: Every group was left out because its frames cannot be decoded again.
    """
    if runtime.teacher is not None and (reason := runtime.teacher.take_unreadable()) and not batch.kept:
        raise UserError(f"the teacher scored no group of the step; the last reason: {reason}")


def check_mismatch(row: Mapping[str, float], config: GrpoRunConfig) -> None:
    """Check that engine and learner agree on the log-probs of sampled tokens.

    Raises:
        UserError: The KL per token exceeds `train.max_mismatch_kl`.
    """
    max_kl = config.train.max_mismatch_kl
    for name, label in metric_names.MISMATCH_KL_LABELS.items():
        kl = row.get(name, 0.0)
        if kl > max_kl:
            raise UserError(
                f"engine and learner disagree{label}: the KL per token is {kl:.3g}, above train.max_mismatch_kl "
                f"({max_kl:g}); their weights or their frames differ"
            )


def staleness_metrics(batch: RolloutBatch, state: TrainingState, config: GrpoRunConfig) -> dict[str, float]:
    """Return share of sampled tokens by staleness, mean and maximum staleness, in updates.

    Raises:
        RuntimeError: A token exceeds `train.max_staleness`; this is a bug of the prefetcher.
    """
    histogram = staleness_histogram(batch.kept, state.weight_version)
    tokens = max(1, sum(histogram.values()))
    if histogram and not 0 <= max(histogram) <= config.train.max_staleness:
        raise RuntimeError(
            f"the maximum staleness is {max(histogram)} updates; it must be at most {config.train.max_staleness}: "
            f"{histogram}"
        )
    return {
        **{f"{metric_names.STALENESS_PREFIX}{age}": count / tokens for age, count in histogram.items()},
        metric_names.STALENESS_MEAN: sum(age * count for age, count in histogram.items()) / tokens,
        metric_names.STALENESS_MAX: float(max(histogram, default=0)),
    }


def batch_metrics(
    batch: RolloutBatch, learner_metrics: Mapping[str, float], publish_report: PublishReport | None
) -> dict[str, float]:
    """Return the metrics of groups, learner and publish; without a report, the step was not published."""
    metrics = {
        **{LEARNER_METRICS.get(name, f"learner/{name}"): value for name, value in learner_metrics.items()},
        "groups/sampled": float(len(batch.sampled)),
        "groups/kept": float(len(batch.kept)),
    }
    if publish_report is not None:
        metrics |= {
            metric_names.WEIGHT_VERSION: float(publish_report.version),
            metric_names.WEIGHT_SYNC_SECONDS: publish_report.sync_s,
            metric_names.WEIGHT_SYNC_BYTES: float(publish_report.nbytes),
            **publish_report.probe_metrics(),
        }
    return metrics
