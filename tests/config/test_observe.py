from __future__ import annotations

import pytest

from vz_ray.config import load
from vz_ray.config.load import ConfigError
from vz_ray.config.run import RunConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.config.sft import SftRunConfig


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("observe.log_format=xml", "log_format is 'xml'; it must be 'text' or 'json'"),
        ("observe.pulse_s=0", "pulse_s is 0.0; it must be above 0"),
        ("observe.pulse_s=30", "10 at most: Ray forgets gauges"),
        ("observe.trace_share=2", "trace_share is 2.0; it is a share of episodes"),
        ("observe.otlp_endpoint=collector:4317", "otlp_endpoint is 'collector:4317'; give the address"),
        ("observe.otlp=x", "did you mean observe.otlp_endpoint"),
        ("ray.metrics_port=99999", "metrics_port is 99999; a port is at most 65535"),
    ],
)
def test_a_wrong_setting_is_named_with_what_would_be_right(override: str, said: str):
    with pytest.raises(ConfigError) as error:
        load(RunConfig, None, [override])
    assert said in str(error.value)


def test_runs_without_engines_of_their_own_have_all_but_traces():
    found = load(SftRunConfig, None, ["observe.log_format=json", "observe.wandb_project=x"]).observe
    assert (found.log_format, found.wandb_project) == ("json", "x")
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        load(SftRunConfig, None, ["observe.otlp_endpoint=http://collector:4318"])


def test_servers_have_the_format_of_logs_alone():
    assert load(ServeConfig, None, ["observe.log_format=json"]).observe.log_format == "json"
    with pytest.raises(ConfigError, match="pulse_s"):
        load(ServeConfig, None, ["observe.pulse_s=1"])
