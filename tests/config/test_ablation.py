"""What an ablation's settings must not say."""

from __future__ import annotations

import pytest

from vz_ray.config import load_config
from vz_ray.config.ablation import VARIANTS, AblationConfig
from vz_ray.config.quickstart import QuickstartConfig
from vz_ray.utils.errors import UserError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seeds=[]", "it needs different seeds"),
        ("seeds=[1,1]", r"seeds is \[1, 1\]; it needs different seeds"),
        ("seeds=[-1]", "none of them negative"),
        ("seed=1", "seed is 1; every variant runs with each of `seeds`"),
        ("variants=[full,without_zoom]", "variants has 'without_zoom'; it may hold full, without_rl"),
        ("variants=[without_rl]", "it needs 'full'"),
        ("reward.tool=0", "without_tool_reward would be the same as full"),
        ("data.test=data/needle/test.json", "set it to data/ablation/test.json"),
        ("reflection.max_per_task=0", r"reflection\.per_task is 0"),
        ("reflection.temperature=0", r"reflection\.temperature is 0"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(AblationConfig, "conf/ablation.yaml", [override])


def test_the_file_asks_for_all_variants_three_seeds_and_a_thousand_questions() -> None:
    config = load_config(AblationConfig, "conf/ablation.yaml")
    assert (tuple(config.variants), config.seeds) == (VARIANTS, [0, 1, 2])
    assert config.test_synth.test * config.test_synth.questions >= 1000


def test_it_is_the_quickstart_on_the_same_videos_but_for_the_questions() -> None:
    config, quick = (
        load_config(AblationConfig, "conf/ablation.yaml"),
        load_config(QuickstartConfig, "conf/quickstart.yaml"),
    )
    for name in ("train", "learner", "sft_learner", "cold_start", "sparse", "episode", "reward", "synth"):
        assert getattr(config, name) == getattr(quick, name), name
    assert (config.data.train, config.data.sft) == (quick.data.train, quick.data.sft)
    assert config.test_synth.directory != quick.synth.directory
    assert [config.test_synth.videos[split] for split in ("train", "sft", "validation")] == [0, 0, 0]
