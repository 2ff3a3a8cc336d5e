"""Config of logs, metrics, trackers and traces."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.fields import InvalidValueError, Section, choice, number


@dataclass
class LoggingConfig(Section):
    """Format of log files."""

    log_format: str = choice("text", "json")
    """`text`, or `json`: one object per line with run, worker, rank, step and episode."""


@dataclass
class TrackingConfig(LoggingConfig):
    """Metrics and experiment trackers of a run."""

    poll_interval_s: float = number(5.0, above=0, maximum=10, reason=", because Ray drops stale gauges")
    """Seconds between polls of rollout workers and decoders, for Prometheus and `vz-ray top`."""
    wandb_project: str = ""
    """Weights & Biases project that receives the metrics; empty disables it."""
    mlflow_tracking_uri: str = ""
    """MLflow tracking server that receives the metrics, or `sqlite:///mlflow.db`; empty disables it."""


@dataclass
class MonitoringConfig(TrackingConfig):
    """Metrics, trackers and traces of a run with rollout workers."""

    otlp_endpoint: str = ""
    """Base address of an OTLP/HTTP collector for traces, for example `http://collector:4318`; empty disables
    traces."""
    trace_sample_ratio: float = number(0.05, minimum=0, maximum=1)
    """Fraction of episodes that are traced; every step is traced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise InvalidValueError(
                "otlp_endpoint",
                f"is {self.otlp_endpoint!r}; it must be the address of an OTLP/HTTP collector, for example "
                "http://collector:4318",
            )
