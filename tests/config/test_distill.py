from __future__ import annotations

import pytest

from vz_ray.config import ConfigError, load_config
from vz_ray.config.distill import ExemplarRunConfig, ReflectionRunConfig

TEACHER = ["teacher.model=m", "teacher.base_url=http://h/v1"]
EXEMPLAR = [*TEACHER, "model=policy", "tasks=t.json"]
REFLECT = [*TEACHER, "model=policy", "episodes=[runs/x]"]


@pytest.mark.parametrize(
    ("schema", "path"),
    [(ExemplarRunConfig, "conf/distill/exemplar.yaml"), (ReflectionRunConfig, "conf/distill/reflect.yaml")],
)
def test_example_files_load_and_limit_the_cost(schema, path):
    config = load_config(schema, path)
    assert config.teacher.max_cost_usd > 0
    assert config.teacher.input_usd_per_mtok > 0
    assert config.teacher.api_key_env


def test_needle_file_loads_for_both_commands():
    for schema, overrides in ((ExemplarRunConfig, EXEMPLAR), (ReflectionRunConfig, REFLECT)):
        assert load_config(schema, "conf/distill/needle.yaml", overrides).episode.max_zoom_frames == 8


@pytest.mark.parametrize(
    ("schema", "overrides", "message"),
    [
        (ExemplarRunConfig, EXEMPLAR[2:], "teacher.model is empty"),
        (ExemplarRunConfig, ["teacher.model=m", "model=p", "tasks=t"], "teacher.base_url is ''"),
        (ExemplarRunConfig, [*TEACHER, "tasks=t"], "model is empty"),
        (ExemplarRunConfig, [*TEACHER, "model=p"], "tasks is empty"),
        (ExemplarRunConfig, [*EXEMPLAR, "attempts_per_task=0"], "attempts_per_task is 0"),
        (ExemplarRunConfig, [*EXEMPLAR, "teacher.image_format=gif"], "teacher.image_format is 'gif'"),
        (
            ExemplarRunConfig,
            [*EXEMPLAR, "teacher.parameters={max_tokens: 3}"],
            "has 'max_tokens', which",
        ),
        (ExemplarRunConfig, [*EXEMPLAR, "teacher.max_cost_usd=5"], "both prices are 0"),
        (ExemplarRunConfig, [*EXEMPLAR, "timeouts.teacher_request_s=0"], "timeouts.teacher_request_s is 0"),
        (ExemplarRunConfig, [*EXEMPLAR, "teacher.input_usd_per_mtok=-1"], "teacher.input_usd_per_mtok is -1"),
        (
            ExemplarRunConfig,
            [*EXEMPLAR, "filter.min_pass_rate=0.9", "filter.max_pass_rate=0.5"],
            "it must be at most max_pass_rate",
        ),
        (ExemplarRunConfig, [*EXEMPLAR, "filter.max_turns_share=0"], "filter.max_turns_share is 0"),
        (ExemplarRunConfig, [*EXEMPLAR, "reward.max_zoom_frames=8"], "follows episode.max_zoom_frames"),
        (ReflectionRunConfig, [*TEACHER, "model=p"], "episodes is empty"),
        (ReflectionRunConfig, [*REFLECT, "max_wrong_per_task=0"], "max_wrong_per_task is 0"),
        (ReflectionRunConfig, [*REFLECT, "episode.max_rounds=2"], "episode.max_rounds is 2"),
    ],
)
def test_invalid_value_is_rejected(schema, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(schema, None, overrides)
