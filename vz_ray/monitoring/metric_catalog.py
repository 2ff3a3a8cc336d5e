"""Every metric that a run exports for Prometheus; no other place names one.

A name here is a name without Ray's own prefix: `vz_weight_sync_seconds` is scraped as
`ray_vz_sync_seconds`, a counter `vz_episodes` as `ray_vz_episodes_total`, a histogram
with `_bucket`, `_sum` and `_count`. Labels are bounded: runs, parts and states, never episodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vz_ray.monitoring import metric_names

RAY_PREFIX = "ray_"
"""What Ray puts before the name of every metric."""

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric.

    Attributes:
        name: Without Ray's prefix.
        kind: `gauge`, `counter` or `histogram`.
        help: One sentence.
        unit: `s`, `bytes`, `ratio`, `nats`, `1/s`, a thing that is counted, or empty.
        labels: Besides those that Ray adds (`NodeAddress`, `WorkerId`, ...).
        key: Which key of `metrics.jsonl` it shows; one that ends in `/` stands for all that begin
            so. Empty for what is measured while an iteration runs.
        scale: What a value of that key is multiplied with.
        buckets: Upper bounds of a histogram.
    """

    name: str
    kind: str
    help: str
    unit: str = ""
    labels: tuple[str, ...] = ("run",)
    key: str = ""
    scale: float = 1.0
    buckets: tuple[float, ...] = ()

    @property
    def series_names(self) -> tuple[str, ...]:
        """The names of its series where they are scraped."""
        full = f"{RAY_PREFIX}{self.name}"
        match self.kind:
            case "counter":
                return (f"{full}_total",)
            case "histogram":
                return (f"{full}_bucket", f"{full}_sum", f"{full}_count")
        return (full,)


def _gauge(
    name: str, help: str, unit: str = "", *labels: str, key: str = "", scale: float = 1.0
) -> MetricSpec:
    return MetricSpec(name, "gauge", help, unit, ("run", *labels), key, scale)


def _counter(name: str, help: str, unit: str, *labels: str) -> MetricSpec:
    return MetricSpec(name, "counter", help, unit, ("run", *labels))


def _histogram(name: str, help: str, *labels: str) -> MetricSpec:
    return MetricSpec(name, "histogram", help, "s", ("run", *labels), buckets=_SECONDS)


_LIVE = (
    _gauge("vz_step", "Iterations done, or steps of a supervised run, or episodes.", "iterations"),
    _gauge("vz_max_steps", "How many the run is to have; 0 where time is what ends it.", "iterations"),
    _gauge("vz_phase", "1 for what the run is doing now, 0 for the rest.", "", "phase"),
    _gauge("vz_heartbeat_timestamp_seconds", "When the driver last said that it lives.", "s"),
    _gauge("vz_last_step_timestamp_seconds", "When the last iteration ended, or the run began.", "s"),
    _gauge(
        "vz_last_checkpoint_timestamp_seconds", "When the last checkpoint was written, or the run began.", "s"
    ),
    _gauge("vz_checkpoint_seconds", "How long the last checkpoint took; 0 before the first.", "s"),
    _gauge("vz_mismatch_kl_limit_nats", "Mismatch at which training stops itself.", "nats"),
    _gauge("vz_workers", "Rollout workers, by state.", "workers", "state"),
    _gauge("vz_episodes_running", "Episodes that workers have.", "episodes"),
    _gauge("vz_episodes_waiting", "Episodes that wait for a worker with room.", "episodes"),
    _gauge("vz_tokens_per_second", "Tokens sampled a second, since the last look.", "1/s"),
    _gauge("vz_episodes_per_second", "Episodes accepted a second, since the last look.", "1/s"),
    _counter("vz_episodes", "Episodes accepted, by how they ended.", "episodes", "status"),
    _counter("vz_sampled_tokens", "Tokens in the turns of accepted episodes.", "tokens"),
    _counter("vz_zoom_calls", "Zooms that episodes asked for, by outcome.", "calls", "outcome"),
    _counter("vz_groups", "Groups played, by whether they were learned from.", "groups", "outcome"),
    _counter("vz_nonfinite_values", "Figures of iterations that were no finite numbers.", "values"),
    _counter("vz_lost_workers", "Rollout workers that died while the run went on.", "workers"),
    _histogram("vz_episode_seconds", "Whole episodes, without their reward."),
    _histogram("vz_generate_seconds", "Sampling of a turn, waiting in the engine included."),
    _histogram("vz_clip_wait_seconds", "What an episode waited for its overview, or for a clip.", "kind"),
    _histogram("vz_decode_seconds", "What a decoder took for a request, by kind.", "kind"),
    _gauge("vz_decoders", "Decoders, by whether they answer.", "decoders", "state"),
    _gauge("vz_decode_requests", "Requests for frames, with a decoder or at the gate.", "requests", "state"),
    _counter("vz_decode_frames", "Frames served, by where they were found.", "frames", "source"),
    _counter("vz_decode_failures", "Attempts at requests that failed, by what happened.", "attempts", "kind"),
    _counter("vz_dropped_records", "Spans and tracker rows that were given up.", "records", "sink"),
)

_OF_ITERATIONS = (
    _gauge(
        "vz_reward", "Mean of a part of the reward, unweighted, or of its total.", "", "part",
        key=metric_names.REWARD_PREFIX,
    ),
    _gauge("vz_zoom_call_ratio", "Episodes that tried a zoom.", "ratio", key=metric_names.ZOOM_CALL_RATE),
    _gauge("vz_zoom_valid_ratio", "Zooms carried out, of those tried.", "ratio", key=metric_names.ZOOM_VALID_RATE),
    _gauge("vz_zooms_per_episode", "Zooms carried out per episode.", "zooms", key=metric_names.ZOOMS_PER_EPISODE),
    _gauge("vz_frames_per_episode", "Frames shown per episode.", "frames", key=metric_names.FRAMES_PER_EPISODE),
    _gauge("vz_answered_ratio", "Episodes that ended with an answer.", "ratio", key=metric_names.ANSWERED_RATE),
    _gauge("vz_invalid_ratio", "Episodes that could not be judged.", "ratio", key=metric_names.INVALID_RATE),
    _gauge("vz_mismatch_kl_nats", "KL of engine and learner per token.", "nats", key=metric_names.MISMATCH_KL),
    _gauge(
        "vz_mismatch_logprob_max_nats", "Largest difference of a token's log-probs.", "nats",
        key=metric_names.MISMATCH_LOGPROB_MAX,
    ),
    _gauge("vz_staleness_mean_updates", "Mean age of the tokens learned from.", "updates",
           key=metric_names.STALENESS_MEAN),
    _gauge("vz_staleness_max_updates", "Age of the oldest token learned from.", "updates",
           key=metric_names.STALENESS_MAX),
    _gauge("vz_weight_version", "Weight version of the engines.", "", key=metric_names.WEIGHT_VERSION),
    _gauge("vz_weight_sync_seconds", "From pausing to resuming generation at a publish.", "s", key=metric_names.WEIGHT_SYNC_SECONDS),
    _gauge("vz_phase_seconds", "How long a part of the iteration took.", "s", "phase",
           key=metric_names.TIME_PREFIX),
    _gauge("vz_step_tokens_per_second", "Tokens sampled a second, learning included.", "1/s",
           key=metric_names.TOKENS_PER_SECOND),
    _gauge("vz_prefix_cache_hit_ratio", "Prompt tokens that engines had computed before.", "ratio",
           key=metric_names.PREFIX_CACHE_HIT_RATE),
    _gauge("vz_frame_cache_hit_ratio", "Frames that engines had been sent before.", "ratio",
           key=metric_names.FRAME_CACHE_HIT_RATE),
    _gauge("vz_kv_cache_usage_ratio", "Use of the fullest key/value cache.", "ratio", key=metric_names.KV_CACHE_USAGE),
    _gauge("vz_preempted_turns", "Turns that gave their place in a key/value cache back.", "turns",
           key=metric_names.PREEMPTED_TURNS),
    _gauge("vz_driver_memory_bytes", "Resident memory of the driver.", "bytes", key=metric_names.DRIVER_MEMORY,
           scale=1e6),
    _gauge("vz_worker_memory_bytes", "Resident memory of the largest worker's own process.", "bytes",
           key=metric_names.WORKER_MEMORY, scale=1e6),
    _gauge("vz_engine_memory_bytes", "Resident memory of the largest engine.", "bytes", key=metric_names.ENGINE_MEMORY,
           scale=1e6),
    _gauge("vz_learner_seconds", "What the learner took for its step.", "s", key=metric_names.LEARNER_SECONDS),
    _gauge("vz_learner_tokens_per_second", "Tokens that the learner read a second.", "1/s",
           key=metric_names.LEARNER_TOKENS_PER_SECOND),
    _gauge("vz_learner_loss", "Loss of the step.", "", key=metric_names.LOSS),
    _gauge("vz_learner_entropy_nats", "Entropy of the policy per token.", "nats", key=metric_names.ENTROPY),
    _gauge("vz_learner_grad_norm", "Norm of the gradient before clipping.", "", key=metric_names.GRAD_NORM),
    _gauge("vz_learner_skipped_updates", "Updates skipped for a loss or gradient that is no finite number.",
           "updates", key=metric_names.SKIPPED_UPDATES),
)  # fmt: skip

METRIC_CATALOG: Mapping[str, MetricSpec] = {metric.name: metric for metric in (*_LIVE, *_OF_ITERATIONS)}
"""By name, in the order of the documentation."""


def all_series_names() -> set[str]:
    """Every name under which a series of ours may be scraped."""
    return {name for metric in METRIC_CATALOG.values() for name in metric.series_names}


def metrics_from_row(row: Mapping[str, float]) -> Iterator[tuple[MetricSpec, dict[str, str], float]]:
    """What a line of `metrics.jsonl` says: metrics, their labels but `run`, and values.

    Example: `{"reward/tool": 0.2}` -> `vz_reward`, `{"part": "tool"}`, 0.2
    """
    for metric in _OF_ITERATIONS:
        if not metric.key.endswith("/"):
            if metric.key in row:
                yield metric, {}, row[metric.key] * metric.scale
            continue
        label = metric.labels[-1]
        for key, value in row.items():
            if key.startswith(metric.key):
                part = key.removeprefix(metric.key).removesuffix("_seconds" if metric.unit == "s" else "")
                yield metric, {label: part}, value * metric.scale


def catalog_table() -> str:
    """The catalogue as a Markdown table, as it stands in the documentation."""
    lines = [
        "| scraped as | kind | unit | labels | what | key of `metrics.jsonl` |",
        "|---|---|---|---|---|---|",
    ]
    for metric in METRIC_CATALOG.values():
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        key = f"`{metric.key}{'*' if metric.key.endswith('/') else ''}`" if metric.key else ""
        shown = metric.series_names[0]
        lines.append(f"| `{shown}` | {metric.kind} | {metric.unit} | {labels} | {metric.help} | {key} |")
    return "\n".join(lines) + "\n"
