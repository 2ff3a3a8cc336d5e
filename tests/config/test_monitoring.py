from __future__ import annotations

import pytest

from vz_ray.config import load_config
from vz_ray.config.load import ConfigError
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.config.sft import SftRunConfig


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("monitoring.log_format=xml", "log_format is 'xml'; it must be 'text' or 'json'"),
        ("monitoring.poll_interval_s=0", "pulse_s is 0.0; it must be above 0"),
        ("monitoring.poll_interval_s=30", "10 at most: Ray forgets gauges"),
        ("monitoring.trace_sample_ratio=2", "trace_share is 2.0; it is a share of episodes"),
        ("monitoring.otlp_endpoint=collector:4317", "otlp_endpoint is 'collector:4317'; give the address"),
        ("monitoring.otlp=x", "did you mean observe.otlp_endpoint"),
        ("ray.metrics_port=99999", "metrics_port is 99999; a port is at most 65535"),
    ],
)
def test_a_wrong_setting_is_named_with_what_would_be_right(override: str, said: str):
    with pytest.raises(ConfigError) as error:
        load_config(GrpoRunConfig, None, [override])
    assert said in str(error.value)


def test_runs_without_engines_of_their_own_have_all_but_traces():
    found = load_config(
        SftRunConfig, None, ["monitoring.log_format=json", "monitoring.wandb_project=x"]
    ).monitoring
    assert (found.log_format, found.wandb_project) == ("json", "x")
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        load_config(SftRunConfig, None, ["monitoring.otlp_endpoint=http://collector:4318"])


def test_servers_have_the_format_of_logs_alone():
    assert load_config(ServeConfig, None, ["monitoring.log_format=json"]).monitoring.log_format == "json"
    with pytest.raises(ConfigError, match="pulse_s"):
        load_config(ServeConfig, None, ["monitoring.poll_interval_s=1"])
