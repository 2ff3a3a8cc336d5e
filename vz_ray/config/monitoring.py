"""What is told of a run while it goes on, and to whom."""

from __future__ import annotations

from dataclasses import dataclass

LOG_FORMATS = ("text", "json")


@dataclass
class LoggingConfig:
    """How log files are written."""

    log_format: str = "text"
    """`text`, or `json`: an object on each line, with run, worker, rank, iteration, episode where known."""

    def __post_init__(self) -> None:
        if self.log_format not in LOG_FORMATS:
            raise ValueError(f"log_format is {self.log_format!r}; it must be 'text' or 'json'")


@dataclass
class TrackingConfig(LoggingConfig):
    """Metrics and trackers of a run."""

    poll_interval_s: float = 5.0
    """Seconds between looks at fleet and decoders, for Prometheus and `vz-ray top`."""
    wandb_project: str = ""
    """Project of Weights & Biases that metrics go to as well; empty for none."""
    mlflow_tracking_uri: str = ""
    """Tracking server of MLflow that metrics go to as well, or `sqlite:///mlflow.db`; empty for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.poll_interval_s <= 10:
            raise ValueError(
                f"poll_interval_s is {self.poll_interval_s}; it must be above 0, and 10 at most: Ray forgets gauges"
            )


@dataclass
class MonitoringConfig(TrackingConfig):
    """Metrics, trackers and traces of a run that plays episodes with its own engines."""

    otlp_endpoint: str = ""
    """Where traces go: the base address of an OTLP/HTTP collector, such as `http://collector:4318`; empty
    makes none."""
    trace_sample_ratio: float = 0.05
    """Share of the episodes that are traced; iterations always are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.trace_sample_ratio <= 1:
            raise ValueError(
                f"trace_sample_ratio is {self.trace_sample_ratio}; it is a share of episodes, from 0 to 1"
            )
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ValueError(
                f"otlp_endpoint is {self.otlp_endpoint!r}; give the address of an OTLP/HTTP collector, such "
                "as http://collector:4318"
            )
