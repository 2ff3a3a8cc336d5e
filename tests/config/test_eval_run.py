"""Evaluation configs: the files in conf/eval and invalid values."""

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
def test_every_file_loads_with_known_benchmarks(path: Path) -> None:
    config = load_config(EvalRunConfig, path)
    assert config.benchmarks or path.stem == "7b"
    assert {entry.adapter or key for key, entry in config.benchmarks.items()} <= set(ADAPTERS)
    assert all(entry.annotations for entry in config.benchmarks.values())
    assert all((FOLDER.parent.parent / prompt).is_file() for prompt in (config.uniform_prompt, config.episode.prompt))


def test_every_benchmark_has_a_file() -> None:
    configs = [load_config(EvalRunConfig, path) for path in FOLDER.glob("*.yaml")]
    assert {e.adapter or key for config in configs for key, e in config.benchmarks.items()} == set(ADAPTERS)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("benchmarks.needle.sampling_strategy=some", "sampling_strategy is 'some'; it must be all, first:N"),
        ("benchmarks.needle.vidoes=x", "did you mean benchmarks.needle.videos"),
        ("modes=[agent,uniform]", "modes has 'uniform'; a mode must be agent, agent:N, agent@Nfps"),
        ("modes=[agent@0fps]", "modes has 'agent@0fps'"),
        ("modes=[agent@2]", "modes has 'agent@2'"),
        ("curve.zoom_fps=[0]", r"curve.zoom_fps is \[0.0\]; each value must be above 0"),
        ("compare.agent=x", "compare has the label 'agent'; a label must consist of letters"),
        ("compare.a_b=x", "compare has the label 'a_b'"),
        ("episode.zoom_fps=-1", "episode.zoom_fps is -1.0; it must be finite and not negative"),
        ("modes=[uniform:0]", "modes has 'uniform:0'"),
        ("curve.uniform_frames=[0]", r"curve.uniform_frames is \[0\]; each value must be at least 1"),
        ("curve.max_zooms=[-1]", r"curve.max_zooms is \[-1\]; each value must be at least 0"),
        ("train.max_steps=3", "unknown key train"),
        ("reward.max_zoom_frames=4", "follows episode.max_zoom_frames; set that instead"),
    ],
)
def test_invalid_value_is_rejected(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(EvalRunConfig, NEEDLE, [override])


def test_mode_changes_episode_config() -> None:
    config = load_config(EvalRunConfig, NEEDLE)
    agent, two_zooms, uniform = (
        EvalMode.parse(text).episode_config(config.episode, "p.yaml") for text in ("agent", "agent:2", "uniform:96")
    )
    assert agent == config.episode
    assert (two_zooms.max_rounds, two_zooms.overview_frames, two_zooms.prompt) == (
        3,
        16,
        "conf/prompt/tiny.yaml",
    )
    assert (uniform.max_rounds, uniform.overview_frames, uniform.max_images, uniform.prompt) == (
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


def test_mode_sets_zoom_fps_and_checkpoint() -> None:
    config = load_config(EvalRunConfig, NEEDLE, ["compare.sft=checkpoints/sft"])
    assert config.compare == {"sft": "checkpoints/sft"}
    mode = EvalMode.parse("sft/agent:2@0.5fps")
    assert mode == EvalMode("agent", 2, 0.5, "sft")
    episode = mode.episode_config(config.episode, "p.yaml")
    assert (episode.max_rounds, episode.zoom_fps) == (3, 0.5)
    assert (mode.stage, mode.title) == ("sft_agent_2_0.5fps", "sft: agent, zooms <= 2, zooms at 0.5 fps")
    assert str(EvalMode.parse("agent@2.0fps")) == "agent@2fps"
    for text in ("agent", "agent:2", "agent@0.5fps", "uniform:32", "sft/agent:2@4fps", "sft/uniform:8"):
        assert str(EvalMode.parse(text)) == text
    with pytest.raises(ValueError, match="it must look like agent"):
        EvalMode.parse("agent@fast")


def test_engine_accepts_the_frames_of_every_mode() -> None:
    config = load_config(EvalRunConfig, NEEDLE, ["modes=[agent,uniform:256]"])
    assert config.rollout.engine.images_per_prompt == 256
    assert load_config(EvalRunConfig, NEEDLE).rollout.engine.images_per_prompt == 64
