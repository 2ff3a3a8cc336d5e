"""All metrics that a run exports to Prometheus.

A name here excludes Ray's prefix: the gauge `vz_weight_sync_seconds` is exported as
`ray_vz_weight_sync_seconds`, the counter `vz_episodes` as `ray_vz_episodes_total`, a histogram with
`_bucket`, `_sum` and `_count`. Labels are bounded: runs, parts and states, never episodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vz_ray.monitoring import metric_names as keys

RAY_PREFIX = "ray_"
"""Prefix that Ray adds to every metric name."""

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """Definition of one metric.

    Attributes:
        name: Name without Ray's prefix.
        kind: `gauge`, `counter` or `histogram`.
        help: Description, one sentence.
        unit: `s`, `bytes`, `ratio`, `nats`, `1/s`, a counted noun, or empty.
        labels: Labels except those that Ray adds (`NodeAddress`, `WorkerId`, ...).
        key: Key in `metrics.jsonl`. A key that ends in `/` matches every key with that prefix.
            Empty for metrics that are measured within a step.
        buckets: Upper bounds of a histogram.
    """

    name: str
    kind: str
    help: str
    unit: str = ""
    labels: tuple[str, ...] = ("run",)
    key: str = ""
    buckets: tuple[float, ...] = ()

    @property
    def series_names(self) -> tuple[str, ...]:
        """Names of the exported series."""
        full = f"{RAY_PREFIX}{self.name}"
        match self.kind:
            case "counter":
                return (f"{full}_total",)
            case "histogram":
                return (f"{full}_bucket", f"{full}_sum", f"{full}_count")
        return (full,)


def _gauge(name: str, help: str, unit: str = "", *labels: str, key: str = "") -> MetricSpec:
    return MetricSpec(name, "gauge", help, unit, ("run", *labels), key)


def _counter(name: str, help: str, unit: str, *labels: str) -> MetricSpec:
    return MetricSpec(name, "counter", help, unit, ("run", *labels))


def _histogram(name: str, help: str, *labels: str) -> MetricSpec:
    return MetricSpec(name, "histogram", help, "s", ("run", *labels), buckets=_SECONDS)


_LIVE_METRICS = (
    _gauge("vz_step", "Completed training steps, or episodes of a distillation run.", "steps"),
    _gauge("vz_max_steps", "Maximum number of steps; 0 if a time limit ends the run.", "steps"),
    _gauge("vz_phase", "1 for the current phase, 0 for the others.", "", "phase"),
    _gauge("vz_heartbeat_timestamp_seconds", "Time of the driver's last heartbeat.", "s"),
    _gauge("vz_last_step_timestamp_seconds", "End of the last step, or start of the run.", "s"),
    _gauge("vz_last_checkpoint_timestamp_seconds", "Time of the last checkpoint, or start of the run.", "s"),
    _gauge("vz_checkpoint_seconds", "Duration of the last checkpoint; 0 before the first.", "s"),
    _gauge("vz_mismatch_kl_limit_nats", "Mismatch KL that stops training.", "nats"),
    _gauge("vz_workers", "Rollout workers by state.", "workers", "state"),
    _gauge("vz_episodes_running", "Episodes running on workers.", "episodes"),
    _gauge("vz_episodes_waiting", "Episodes queued for a worker.", "episodes"),
    _gauge("vz_tokens_per_second", "Sampled tokens per second since the last heartbeat.", "1/s"),
    _gauge("vz_episodes_per_second", "Accepted episodes per second since the last heartbeat.", "1/s"),
    _counter("vz_episodes", "Accepted episodes by status.", "episodes", "status"),
    _counter("vz_sampled_tokens", "Sampled tokens of accepted episodes.", "tokens"),
    _counter("vz_zoom_calls", "Zoom calls by outcome.", "calls", "outcome"),
    _counter("vz_groups", "Groups by outcome: kept for training or dropped.", "groups", "outcome"),
    _counter("vz_nonfinite_values", "Non-finite metric values.", "values"),
    _counter("vz_lost_workers", "Rollout workers that died during the run.", "workers"),
    _histogram("vz_episode_seconds", "Episode duration without scoring."),
    _histogram("vz_generate_seconds", "Time to sample a turn, including the engine's queue."),
    _histogram("vz_clip_wait_seconds", "Time that an episode waited for its overview or a clip.", "kind"),
    _histogram("vz_decode_seconds", "Time that a decoder spent on a request, by kind.", "kind"),
    _gauge("vz_decoders", "Decoders by state: responsive or unresponsive.", "decoders", "state"),
    _gauge("vz_decode_requests", "Decode requests, in flight or waiting.", "requests", "state"),
    _counter("vz_decode_frames", "Served frames by source.", "frames", "source"),
    _counter("vz_decode_failures", "Failed attempts of decode requests by kind.", "attempts", "kind"),
    _counter("vz_dropped_records", "Dropped traces and tracker rows.", "records", "sink"),
)

_STEP_METRICS = (
    _gauge("vz_reward", "Mean of each unweighted reward part, and of the total.", "", "part", key=keys.REWARD_PREFIX),
    _gauge("vz_zoom_call_ratio", "Episodes with a zoom call.", "ratio", key=keys.ZOOM_CALL_RATE),
    _gauge("vz_zoom_valid_ratio", "Valid zoom calls.", "ratio", key=keys.ZOOM_VALID_RATE),
    _gauge("vz_zoom_event_coverage_ratio", "Episodes in which a zoom showed an evidence span.", "ratio",
           key=keys.EVENT_COVERAGE),
    _gauge("vz_zooms_per_episode", "Valid zoom calls per episode.", "zooms", key=keys.ZOOMS_PER_EPISODE),
    _gauge("vz_zoom_accuracy_gain_ratio", "Accuracy with a zoom minus accuracy without one, in groups with both.",
           "ratio", key=keys.ZOOM_ACCURACY_GAIN),
    _gauge("vz_frames_per_episode", "Frames per episode.", "frames", key=keys.FRAMES_PER_EPISODE),
    _gauge("vz_overview_frames_per_episode", "Frames of the overview per episode.", "frames",
           key=keys.OVERVIEW_FRAMES),
    _gauge("vz_overview_fallback_ratio", "Overviews that fell back to uniform frames.", "ratio",
           key=keys.OVERVIEW_FALLBACK_RATE),
    _gauge("vz_answered_ratio", "Episodes with an answer.", "ratio", key=keys.ANSWERED_RATE),
    _gauge("vz_resumed_turns", "Turns of lost workers that were not sampled again.", "turns",
           key=keys.RESUMED_TURNS),
    _gauge("vz_unparsed_ratio", "Answers that could not be parsed.", "ratio", key=keys.UNPARSED_RATE),
    _gauge("vz_invalid_ratio", "Episodes that could not be scored.", "ratio", key=keys.INVALID_RATE),
    _gauge("vz_invalid_reason_ratio", "Episodes that could not be scored, by reason.", "ratio", "reason",
           key=keys.INVALID_REASON_PREFIX),
    _gauge("vz_task_skip_ratio", "Mean probability to skip a task in an epoch.", "ratio", key=keys.SKIP_RATE),
    _gauge("vz_mismatch_kl_nats", "KL between engine and learner per token.", "nats", key=keys.MISMATCH_KL),
    _gauge("vz_mismatch_kl_after_image_nats", "The same KL in turns that follow frames.", "nats",
           key=keys.MISMATCH_KL_IMAGE),
    _gauge("vz_mismatch_kl_after_text_nats", "The same KL in turns that follow text only.", "nats",
           key=keys.MISMATCH_KL_TEXT),
    _gauge("vz_mismatch_logprob_max_nats", "Maximum difference between the log-probs of a token.", "nats",
           key=keys.MISMATCH_LOGPROB_MAX),
    _gauge("vz_mismatch_sequence_mean_nats", "Mean difference between the summed log-probs of a trajectory.", "nats",
           key=keys.MISMATCH_SEQUENCE_MEAN),
    _gauge("vz_mismatch_sequence_max_nats", "Maximum difference between the summed log-probs of a trajectory.", "nats",
           key=keys.MISMATCH_SEQUENCE_MAX),
    _gauge("vz_mismatch_sequence_outlier_ratio", "Trajectories whose probability differs by more than a factor of 2.",
           "ratio", key=keys.MISMATCH_SEQUENCE_OUTLIERS),
    _gauge("vz_correction_truncated_weight_ratio", "Tokens whose importance weight is capped.", "ratio",
           key=keys.TRUNCATED_WEIGHTS),
    _gauge("vz_correction_rejected_token_ratio", "Tokens that rejection leaves out of the loss.", "ratio",
           key=keys.REJECTED_TOKENS),
    _gauge("vz_correction_rejected_trajectory_ratio", "Trajectories that rejection leaves out of the loss.", "ratio",
           key=keys.REJECTED_TRAJECTORIES),
    _gauge("vz_teacher_kl_nats", "Reverse KL of the student to its teacher per token.", "nats", key=keys.TEACHER_KL),
    _gauge("vz_teacher_scored_token_ratio", "Sampled tokens that the teacher scored.", "ratio",
           key=keys.TEACHER_SCORED_TOKENS),
    _gauge("vz_teacher_score_seconds", "Mean time to score a group.", "s", key=keys.TEACHER_SCORE_SECONDS),
    _gauge("vz_staleness_mean_updates", "Mean age of the training tokens.", "updates", key=keys.STALENESS_MEAN),
    _gauge("vz_staleness_max_updates", "Maximum age of the training tokens.", "updates", key=keys.STALENESS_MAX),
    _gauge("vz_weight_version", "Weight version of the engines.", "", key=keys.WEIGHT_VERSION),
    _gauge("vz_weight_sync_seconds", "Time from pause to resume of generation in a publish.", "s",
           key=keys.WEIGHT_SYNC_SECONDS),
    _gauge("vz_weight_sync_bytes", "Size of a published version: all weights, or the adapters.", "bytes",
           key=keys.WEIGHT_SYNC_BYTES),
    _gauge("vz_wake_seconds", "Part of a publish in which sleeping engines allocate their memory.", "s",
           key=keys.WAKE_SECONDS),
    _gauge("vz_probe_gap_nats", "Mean log-prob gap of the parity probe after a publish.", "nats", key=keys.PROBE_GAP),
    _gauge("vz_probe_kl_nats", "KL of the parity probe after a publish.", "nats", key=keys.PROBE_KL),
    _gauge("vz_probe_tolerance_nats", "Limit of the parity probe's mean gap.", "nats", key=keys.PROBE_TOLERANCE),
    _gauge("vz_phase_seconds", "Duration of each phase of a step.", "s", "phase", key=keys.TIME_PREFIX),
    _gauge("vz_step_tokens_per_second", "Sampled tokens per second of the whole step.", "1/s",
           key=keys.TOKENS_PER_SECOND),
    _gauge("vz_prefix_cache_hit_ratio", "Prompt tokens in the engines' prefix caches.", "ratio",
           key=keys.PREFIX_CACHE_HIT_RATE),
    _gauge("vz_frame_cache_hit_ratio", "Frames in the engines' frame caches.", "ratio", key=keys.FRAME_CACHE_HIT_RATE),
    _gauge("vz_kv_cache_usage_ratio", "Highest KV cache usage of an engine.", "ratio", key=keys.KV_CACHE_USAGE),
    _gauge("vz_preempted_turns", "Preempted turns.", "turns", key=keys.PREEMPTED_TURNS),
    _gauge("vz_driver_memory_bytes", "Resident memory of the driver.", "bytes", key=keys.DRIVER_MEMORY),
    _gauge("vz_worker_memory_bytes", "Resident memory of the largest worker process.", "bytes", key=keys.WORKER_MEMORY),
    _gauge("vz_engine_memory_bytes", "Resident memory of the largest engine.", "bytes", key=keys.ENGINE_MEMORY),
    _gauge("vz_learner_seconds", "Duration of the learner step.", "s", key=keys.LEARNER_SECONDS),
    _gauge("vz_learner_tokens_per_second", "Tokens per second of the learner step.", "1/s",
           key=keys.LEARNER_TOKENS_PER_SECOND),
    _gauge("vz_learner_loss", "Loss of the step.", "", key=keys.LOSS),
    _gauge("vz_learner_entropy_nats", "Policy entropy per token.", "nats", key=keys.ENTROPY),
    _gauge("vz_learner_entropy_coef", "Coefficient of the entropy bonus with an entropy target.", "",
           key=keys.ENTROPY_COEF),
    _gauge("vz_learner_kl_nats", "KL to the reference model per token.", "nats", key=keys.KL_TO_REFERENCE),
    _gauge("vz_learner_grad_norm", "Gradient norm before clipping.", "", key=keys.GRAD_NORM),
    _gauge("vz_learner_skipped_updates", "Updates skipped because of a non-finite loss or gradient.", "updates",
           key=keys.SKIPPED_UPDATES),
    _gauge("vz_teacher_correct_ratio", "Correct episodes of the teacher.", "ratio", key=keys.TEACHER_CORRECT_RATE),
    _gauge("vz_teacher_failed_ratio", "Failed episodes of the teacher.", "ratio", key=keys.TEACHER_FAILED_RATE),
    _gauge("vz_teacher_cost_usd", "Cost of the teacher's requests.", "USD", key=keys.TEACHER_COST_USD),
)  # fmt: skip

METRIC_CATALOG: Mapping[str, MetricSpec] = {spec.name: spec for spec in (*_LIVE_METRICS, *_STEP_METRICS)}
"""Metrics by name, in the order of the documentation."""


def metrics_from_row(row: Mapping[str, float]) -> Iterator[tuple[MetricSpec, dict[str, str], float]]:
    """Yield the metrics of a row of `metrics.jsonl`, their labels except `run`, and their values.

    Example: `{"reward/tool": 0.2}` -> `vz_reward`, `{"part": "tool"}`, 0.2
    """
    for metric in _STEP_METRICS:
        if not metric.key.endswith("/"):
            if metric.key in row:
                yield metric, {}, row[metric.key]
            continue
        label = metric.labels[-1]
        for key, value in row.items():
            if key.startswith(metric.key):
                part = key.removeprefix(metric.key).removesuffix("_seconds" if metric.unit == "s" else "")
                yield metric, {label: part}, value
