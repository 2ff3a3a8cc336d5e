"""The files in conf/eval, and what an evaluation's settings must not say."""

from __future__ import annotations

from pathlib import Path

import pytest

import vz_ray
from vz_ray.config import load_config
from vz_ray.config.eval_run import EvalRunConfig
from vz_ray.eval.benchmarks import ADAPTERS
from vz_ray.eval.eval_mode import EvalMode
from vz_ray.utils.errors import UserError

FOLDER = Path(vz_ray.__file__).parent.parent / "conf" / "eval"
NEEDLE = FOLDER / "needle.yaml"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_loads_and_names_benchmarks_that_there_are(path: Path) -> None:
    config = load_config(EvalRunConfig, path)
    assert config.benchmarks or path.stem == "7b"
    assert {entry.adapter or key for key, entry in config.benchmarks.items()} <= set(ADAPTERS)
    assert all(entry.annotations for entry in config.benchmarks.values())
    assert all(
        (FOLDER.parent.parent / prompt).is_file() for prompt in (config.uniform_prompt, config.episode.prompt)
    )


def test_every_benchmark_has_a_file() -> None:
    configs = [load_config(EvalRunConfig, path) for path in FOLDER.glob("*.yaml")]
    assert {e.adapter or key for config in configs for key, e in config.benchmarks.items()} == set(ADAPTERS)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("benchmarks.needle.sampling_strategy=some", "sampling_strategy is 'some'; it must be all, first:N"),
        ("benchmarks.needle.vidoes=x", "did you mean benchmarks.needle.videos"),
        ("modes=[agent,uniform]", "modes has 'uniform'; a mode is agent, agent:N, agent@Nfps"),
        ("modes=[agent@0fps]", "modes has 'agent@0fps'"),
        ("modes=[agent@2]", "modes has 'agent@2'"),
        ("curve.zoom_fps=[0]", r"curve.zoom_fps is \[0.0\]; frame rates are above 0"),
        ("compare.agent=x", "compare has the label 'agent'; labels are letters, digits and hyphens"),
        ("compare.a_b=x", "compare has the label 'a_b'"),
        ("episode.zoom_fps=-1", "episode.zoom_fps is -1.0; it must be a frame rate, or 0"),
        ("modes=[uniform:0]", "modes has 'uniform:0'"),
        ("modes=[uniform:256]", "images_per_prompt is 128, below the 256 frames"),
        ("curve.max_zooms=[-1]", r"curve.max_zooms \[-1\]"),
        ("train.max_steps=3", "there is no key train"),
        ("episode.max_zoom_frames=4", "they must be equal"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config(EvalRunConfig, NEEDLE, [override])


def test_modes_change_the_rules_of_an_episode() -> None:
    config = load_config(EvalRunConfig, NEEDLE)
    agent, two, frames = (
        EvalMode.parse(text).episode_config(config.episode, "p.yaml")
        for text in ("agent", "agent:2", "uniform:96")
    )
    assert agent == config.episode
    assert (two.max_rounds, two.overview_frames, two.prompt) == (3, 16, "conf/prompt/tiny.yaml")
    assert (frames.max_rounds, frames.overview_frames, frames.max_images, frames.prompt) == (
        1,
        96,
        96,
        "p.yaml",
    )
    assert config.curve.modes == [
        *(f"uniform:{n}" for n in (8, 16, 32, 64, 128)),
        *(f"agent:{n}" for n in range(5)),
        *(f"agent@{n}fps" for n in ("0.5", "1", "2", "4")),
    ]
    assert (EvalMode.parse("agent:0").stage, EvalMode.parse("uniform:8").title) == (
        "agent_0",
        "uniform, 8 frames",
    )


def test_a_mode_may_fix_the_rate_of_zooms_and_name_who_plays() -> None:
    config = load_config(EvalRunConfig, NEEDLE, ["compare.sft=checkpoints/sft"])
    assert config.compare == {"sft": "checkpoints/sft"}
    mode = EvalMode.parse("sft/agent:2@0.5fps")
    assert mode == EvalMode("agent", 2, 0.5, "sft")
    rules = mode.episode_config(config.episode, "p.yaml")
    assert (rules.max_rounds, rules.zoom_fps) == (3, 0.5)
    assert (mode.stage, mode.title) == ("sft_agent_2_0.5fps", "sft: agent, zooms <= 2, zooms at 0.5 fps")
    assert str(EvalMode.parse("agent@2.0fps")) == "agent@2fps"
    for text in ("agent", "agent:2", "agent@0.5fps", "uniform:32", "sft/agent:2@4fps", "sft/uniform:8"):
        assert str(EvalMode.parse(text)) == text
    with pytest.raises(ValueError, match="no mode such as"):
        EvalMode.parse("agent@fast")
