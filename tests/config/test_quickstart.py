"""What a quickstart's settings must not say together."""

from __future__ import annotations

import pytest

from vz_ray.config import load_config
from vz_ray.config.quickstart import QuickstartConfig
from vz_ray.utils.errors import UserError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft_learner.model=here", "it is `model` of the run"),
        ("sft_learner.optimizer.lr_schedule=cosine", "such as cold_start.lr_schedule"),
        ("sft_continued.max_time_s=5", "leave it at 0"),
        ("cold_start.lr_schedule=linear", "'linear'; it must be 'constant' or 'cosine'"),
        ("cold_start.max_steps=0", "must be at least 1"),
        ("sparse_zoom_share=1.5", "sparse_zoom_share is 1.5; it is a share"),
        ("weights.transport=nccl", "which takes 'shm'"),
    ],
)
def test_a_setting_that_would_be_ignored_or_makes_no_sense_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(QuickstartConfig, "conf/quickstart.yaml", [override])


def test_a_decay_needs_to_know_its_end() -> None:
    with pytest.raises(UserError, match=r"does not go with sft\.max_seconds"):
        load_config(QuickstartConfig, "conf/quickstart.yaml", ["baseline_sft.lr_schedule=cosine"])
