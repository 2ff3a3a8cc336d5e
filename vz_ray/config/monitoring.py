"""Config of logs, metrics, trackers and traces."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.validation import InvalidValueError, check_choice, check_fraction

LOG_FORMATS = ("text", "json")


@dataclass
class LoggingConfig:
    """Format of log files."""

    log_format: str = "text"
    """`text`, or `json`: one object per line with run, worker, rank, step and episode."""

    def __post_init__(self) -> None:
        check_choice(self, "log_format", LOG_FORMATS)


@dataclass
class TrackingConfig(LoggingConfig):
    """Metrics and experiment trackers of a run."""

    poll_interval_s: float = 5.0
    """Seconds between polls of rollout workers and decoders, for Prometheus and `vz-ray top`."""
    wandb_project: str = ""
    """Weights & Biases project that receives the metrics; empty disables it."""
    mlflow_tracking_uri: str = ""
    """MLflow tracking server that receives the metrics, or `sqlite:///mlflow.db`; empty disables it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.poll_interval_s <= 10:
            raise InvalidValueError(
                "poll_interval_s",
                f"is {self.poll_interval_s}; it must be above 0 and at most 10, because Ray drops stale gauges",
            )


@dataclass
class MonitoringConfig(TrackingConfig):
    """Metrics, trackers and traces of a run with rollout workers."""

    otlp_endpoint: str = ""
    """Base address of an OTLP/HTTP collector for traces, for example `http://collector:4318`; empty disables
    traces."""
    trace_sample_ratio: float = 0.05
    """Fraction of episodes that are traced; every step is traced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self, "trace_sample_ratio")
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise InvalidValueError(
                "otlp_endpoint",
                f"is {self.otlp_endpoint!r}; it must be the address of an OTLP/HTTP collector, for example "
                "http://collector:4318",
            )
