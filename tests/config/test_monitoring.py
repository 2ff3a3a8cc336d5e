from __future__ import annotations

import pytest

from vz_ray.config import load_config
from vz_ray.config.load import ConfigError
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.config.sft import SftRunConfig


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("monitoring.log_format=xml", "monitoring.log_format is 'xml'; it must be one of text, json"),
        ("monitoring.poll_interval_s=0", "monitoring.poll_interval_s is 0.0; it must be above 0"),
        ("monitoring.poll_interval_s=30", "at most 10, because Ray drops stale gauges"),
        (
            "monitoring.trace_sample_ratio=2",
            "monitoring.trace_sample_ratio is 2.0; it must be between 0 and 1",
        ),
        (
            "monitoring.otlp_endpoint=collector:4317",
            "otlp_endpoint is 'collector:4317'; it must be the address",
        ),
        ("monitoring.otlp=x", "did you mean monitoring.otlp_endpoint"),
        ("ray.metrics_port=99999", "metrics_port is 99999; it must be between 0 and 65535"),
    ],
)
def test_invalid_value_is_rejected(override: str, message: str):
    with pytest.raises(ConfigError) as error:
        load_config(GrpoRunConfig, None, [override])
    assert message in str(error.value)


def test_sft_run_has_trackers_but_no_traces():
    monitoring = load_config(
        SftRunConfig, None, ["monitoring.log_format=json", "monitoring.wandb_project=x"]
    ).monitoring
    assert (monitoring.log_format, monitoring.wandb_project) == ("json", "x")
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        load_config(SftRunConfig, None, ["monitoring.otlp_endpoint=http://collector:4318"])


def test_server_has_log_format_only():
    assert load_config(ServeConfig, None, ["monitoring.log_format=json"]).monitoring.log_format == "json"
    with pytest.raises(ConfigError, match="poll_interval_s"):
        load_config(ServeConfig, None, ["monitoring.poll_interval_s=1"])
