from __future__ import annotations

import pytest

from vz_ray.config import ConfigError, load
from vz_ray.config.distill import ExemplarConfig, ReflectConfig

EXPERT = ["expert.model=m", "expert.base_url=http://h/v1"]
EXEMPLAR = [*EXPERT, "model=policy", "tasks=t.json"]
REFLECT = [*EXPERT, "model=policy", "episodes=[runs/x]"]


@pytest.mark.parametrize(
    ("schema", "path"),
    [(ExemplarConfig, "conf/distill/exemplar.yaml"), (ReflectConfig, "conf/distill/reflect.yaml")],
)
def test_the_recipes_that_come_with_it_can_be_read_and_have_a_limit(schema, path):
    config = load(schema, path)
    assert config.expert.limit_usd > 0
    assert config.expert.input_usd > 0
    assert config.expert.api_key_env


def test_the_needle_recipe_is_for_both():
    for schema, given in ((ExemplarConfig, EXEMPLAR), (ReflectConfig, REFLECT)):
        assert load(schema, "conf/distill/needle.yaml", given).episode.max_zoom_frames == 8


@pytest.mark.parametrize(
    ("schema", "given", "message"),
    [
        (ExemplarConfig, EXEMPLAR[2:], "expert.model is empty"),
        (ExemplarConfig, ["expert.model=m", "model=p", "tasks=t"], "expert.base_url is ''"),
        (ExemplarConfig, [*EXPERT, "tasks=t"], "model is empty"),
        (ExemplarConfig, [*EXPERT, "model=p"], "tasks is empty"),
        (ExemplarConfig, [*EXEMPLAR, "attempts=0"], "attempts is 0"),
        (ExemplarConfig, [*EXEMPLAR, "expert.image=gif"], "expert.image is 'gif'"),
        (
            ExemplarConfig,
            [*EXEMPLAR, "expert.parameters={max_tokens: 3}"],
            "has 'max_tokens', which",
        ),
        (ExemplarConfig, [*EXEMPLAR, "expert.limit_usd=5"], "nothing has a price"),
        (ExemplarConfig, [*EXEMPLAR, "expert.timeout_s=0"], "expert.timeout_s is 0"),
        (ExemplarConfig, [*EXEMPLAR, "expert.input_usd=-1"], "expert.input_usd is -1"),
        (ExemplarConfig, [*EXEMPLAR, "curate.min_pass=0.9", "curate.max_pass=0.5"], "in order"),
        (ExemplarConfig, [*EXEMPLAR, "curate.most_of_turns=0"], "curate.most_of_turns is 0"),
        (ExemplarConfig, [*EXEMPLAR, "reward.max_zoom_frames=8"], "they must be equal"),
        (ReflectConfig, [*EXPERT, "model=p"], "episodes is empty"),
        (ReflectConfig, [*REFLECT, "wrong_per_task=0"], "wrong_per_task is 0"),
        (ReflectConfig, [*REFLECT, "episode.max_rounds=2"], "episode.max_rounds is 2"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_must_be(schema, given, message):
    with pytest.raises(ConfigError, match=message):
        load(schema, None, given)
