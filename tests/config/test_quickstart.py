"""What a quickstart's settings must not say together."""

from __future__ import annotations

import pytest

from vz_ray.config import load
from vz_ray.config.quickstart import QuickstartConfig
from vz_ray.observe.errors import UserError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft_learner.model=here", "it is `model` of the run"),
        ("sft_learner.optimizer.schedule=cosine", "such as cold_start.schedule"),
        ("sft_continued.max_seconds=5", "leave it at 0"),
        ("cold_start.schedule=linear", "'linear'; it must be 'constant' or 'cosine'"),
        ("cold_start.steps=0", "must be at least 1"),
        ("sparse=1.5", "sparse is 1.5; it is a share"),
        ("weights.transport=nccl", "which takes 'shm'"),
    ],
)
def test_a_setting_that_would_be_ignored_or_makes_no_sense_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(QuickstartConfig, "conf/quickstart.yaml", [override])


def test_a_decay_needs_to_know_its_end() -> None:
    with pytest.raises(UserError, match=r"does not go with sft\.max_seconds"):
        load(QuickstartConfig, "conf/quickstart.yaml", ["baseline_sft.schedule=cosine"])
