"""Settings of a run that do not go together."""

from __future__ import annotations

import pytest

from vz_ray.config import load_config
from vz_ray.config.load import ConfigError
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.sft import SftRunConfig


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.batch_size=10", "learner.mini_batch_size=4"],
            r"train\.tasks is 10, no multiple of learner\.mini_batch_size \(4\).*2 tasks alone.*8 or 12",
        ),
        (
            ["learner.micro_batch_tokens=4096", "episode.max_context=8192"],
            r"micro_batch_tokens is 4096, below episode\.max_context \(8192\)",
        ),
    ],
)
def test_what_does_not_divide_or_fit_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(GrpoRunConfig, None, overrides)


def test_fewer_tasks_than_a_minibatch_are_one_update() -> None:
    assert (
        load_config(GrpoRunConfig, None, ["train.batch_size=3", "learner.mini_batch_size=8"]).train.batch_size
        == 3
    )


def test_supervised_runs_must_fit_too() -> None:
    with pytest.raises(ConfigError, match=r"below episode\.max_context \(32768\)"):
        load_config(SftRunConfig, None, ["learner.micro_batch_tokens=1000"])
