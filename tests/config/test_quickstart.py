"""Invalid values of a quickstart config."""

from __future__ import annotations

from pathlib import Path

import pytest

from vz_ray.config import load_config
from vz_ray.config.quickstart import QuickstartConfig, quickstart_file
from vz_ray.families import FAMILIES
from vz_ray.needle.tiny_families import TINY_FAMILIES
from vz_ray.utils.errors import UserError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft_learner.model=here", "sft_learner.model follows model"),
        ("sft_learner.optimizer.lr_schedule=cosine", "set cold_start.lr_schedule instead"),
        ("sft_continued.max_time_s=5", "it must be 0"),
        ("cold_start.lr_schedule=linear", "'linear'; it must be one of constant, cosine"),
        ("cold_start.max_steps=0", "must be at least 1"),
        ("sparse_zoom_share=1.5", "sparse_zoom_share is 1.5; it must be between 0 and 1"),
        ("weights.transport=nccl", "which requires 'shm'"),
    ],
)
def test_invalid_value_is_rejected(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(QuickstartConfig, "conf/quickstart.yaml", [override])


@pytest.mark.parametrize("family", FAMILIES)
def test_family_selects_config_file(family: str) -> None:
    overrides = ["seed=3", f"family={family}"]
    config = load_config(QuickstartConfig, quickstart_file(overrides), overrides)
    assert config.family == family
    factor = TINY_FAMILIES[family].frame_side
    assert config.episode.min_pixels == config.episode.max_pixels == factor**2
    assert config.synth.side == 4 * factor
    assert config.rollout.engine.dtype == TINY_FAMILIES[family].engine_dtype
    directories = {str(Path(getattr(config.data, split)).parent) for split in ("train", "sft", "validation", "test")}
    assert directories == {config.synth.directory}


def test_unknown_family_is_rejected() -> None:
    overrides = ["family=qwen9"]
    with pytest.raises(UserError, match="qwen9"):
        load_config(QuickstartConfig, quickstart_file(overrides), overrides)


def test_cosine_schedule_without_step_limit_is_rejected() -> None:
    with pytest.raises(UserError, match=r"cannot be used with max_time_s"):
        load_config(QuickstartConfig, "conf/quickstart.yaml", ["baseline_sft.lr_schedule=cosine"])
