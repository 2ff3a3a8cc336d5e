"""Ablation config."""

from __future__ import annotations

import pytest

from vz_ray.config import load_config
from vz_ray.config.ablation import VARIANTS, AblationConfig
from vz_ray.config.quickstart import QuickstartConfig
from vz_ray.utils.errors import UserError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seeds=[]", "it must list distinct"),
        ("seeds=[1,1]", r"seeds is \[1, 1\]; it must list distinct"),
        ("seeds=[-1]", "non-negative seeds"),
        ("seed=1", "seed is 1; set seeds instead"),
        (
            "variants=[full,without_zoom]",
            "variants has 'without_zoom'; a variant must be one of full, without_rl",
        ),
        ("variants=[without_rl]", "it must contain 'full'"),
        ("reward.tool=0", "without_tool_reward would equal full"),
        (
            "data.test=data/needle/test.json",
            "it must be the test file of test_synth, data/ablation/test.json",
        ),
        ("reflection.max_per_task=0", r"reflection\.max_per_task is 0"),
        ("reflection.temperature=0", r"reflection\.temperature is 0"),
    ],
)
def test_invalid_value_is_rejected(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(AblationConfig, "conf/ablation.yaml", [override])


def test_file_has_all_variants_three_seeds_and_1000_questions() -> None:
    config = load_config(AblationConfig, "conf/ablation.yaml")
    assert (tuple(config.variants), config.seeds) == (VARIANTS, [0, 1, 2])
    assert config.test_synth.test * config.test_synth.questions >= 1000


def test_file_equals_quickstart_except_test_videos() -> None:
    config, quick = (
        load_config(AblationConfig, "conf/ablation.yaml"),
        load_config(QuickstartConfig, "conf/quickstart.yaml"),
    )
    for name in (
        "train",
        "learner",
        "sft_learner",
        "cold_start",
        "sparse_zoom_share",
        "episode",
        "reward",
        "synth",
    ):
        assert getattr(config, name) == getattr(quick, name), name
    assert (config.data.train, config.data.sft) == (quick.data.train, quick.data.sft)
    assert config.test_synth.directory != quick.synth.directory
    assert [config.test_synth.videos[split] for split in ("train", "sft", "validation")] == [0, 0, 0]
