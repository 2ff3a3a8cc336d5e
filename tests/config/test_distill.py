from __future__ import annotations

import pytest

from vz_ray.config import ConfigError, load_config
from vz_ray.config.distill import ExemplarRunConfig, ReflectionRunConfig

EXPERT = ["teacher.model=m", "teacher.base_url=http://h/v1"]
EXEMPLAR = [*EXPERT, "model=policy", "tasks=t.json"]
REFLECT = [*EXPERT, "model=policy", "episodes=[runs/x]"]


@pytest.mark.parametrize(
    ("schema", "path"),
    [(ExemplarRunConfig, "conf/distill/exemplar.yaml"), (ReflectionRunConfig, "conf/distill/reflect.yaml")],
)
def test_the_recipes_that_come_with_it_can_be_read_and_have_a_limit(schema, path):
    config = load_config(schema, path)
    assert config.expert.limit_usd > 0
    assert config.expert.input_usd > 0
    assert config.expert.api_key_env


def test_the_needle_recipe_is_for_both():
    for schema, given in ((ExemplarRunConfig, EXEMPLAR), (ReflectionRunConfig, REFLECT)):
        assert load_config(schema, "conf/distill/needle.yaml", given).episode.max_zoom_frames == 8


@pytest.mark.parametrize(
    ("schema", "given", "message"),
    [
        (ExemplarRunConfig, EXEMPLAR[2:], "expert.model is empty"),
        (ExemplarRunConfig, ["teacher.model=m", "model=p", "tasks=t"], "expert.base_url is ''"),
        (ExemplarRunConfig, [*EXPERT, "tasks=t"], "model is empty"),
        (ExemplarRunConfig, [*EXPERT, "model=p"], "tasks is empty"),
        (ExemplarRunConfig, [*EXEMPLAR, "attempts_per_task=0"], "attempts_per_task is 0"),
        (ExemplarRunConfig, [*EXEMPLAR, "teacher.image_format=gif"], "teacher.image_format is 'gif'"),
        (
            ExemplarRunConfig,
            [*EXEMPLAR, "teacher.parameters={max_tokens: 3}"],
            "has 'max_tokens', which",
        ),
        (ExemplarRunConfig, [*EXEMPLAR, "teacher.max_cost_usd=5"], "nothing has a price"),
        (ExemplarRunConfig, [*EXEMPLAR, "teacher.request_timeout_s=0"], "teacher.request_timeout_s is 0"),
        (ExemplarRunConfig, [*EXEMPLAR, "teacher.input_usd_per_mtok=-1"], "teacher.input_usd_per_mtok is -1"),
        (ExemplarRunConfig, [*EXEMPLAR, "filter.min_pass_rate=0.9", "filter.max_pass_rate=0.5"], "in order"),
        (ExemplarRunConfig, [*EXEMPLAR, "filter.max_turns_share=0"], "filter.max_turns_share is 0"),
        (ExemplarRunConfig, [*EXEMPLAR, "reward.max_zoom_frames=8"], "they must be equal"),
        (ReflectionRunConfig, [*EXPERT, "model=p"], "episodes is empty"),
        (ReflectionRunConfig, [*REFLECT, "max_wrong_per_task=0"], "max_wrong_per_task is 0"),
        (ReflectionRunConfig, [*REFLECT, "episode.max_rounds=2"], "episode.max_rounds is 2"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_must_be(schema, given, message):
    with pytest.raises(ConfigError, match=message):
        load_config(schema, None, given)
