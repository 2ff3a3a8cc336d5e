from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vz_ray.config import ConfigError, load_config, to_yaml
from vz_ray.config.load import list_keys


@dataclass(frozen=True, slots=True)
class Clip:
    low: float = 0.2
    high: float = 0.27

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low must not exceed high, got {self.low} > {self.high}")


@dataclass(frozen=True, slots=True)
class Learner:
    lr: float = 1e-6
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    clip: Clip = field(default_factory=Clip)


@dataclass(frozen=True, slots=True)
class Run:
    model: str
    seed: int = 0
    learner: Learner = field(default_factory=Learner)


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_overrides_win_over_the_file_and_the_file_over_defaults(write):
    path = write("model: tiny\nseed: 1\nlearner:\n  lr: 1e-5\n  clip: {low: 0.1}\n")
    run = load_config(Run, path, ["seed=2", "learner.betas=[0.5, 0.6]"])
    assert run == Run("tiny", 2, Learner(1e-5, [0.5, 0.6], Clip(0.1, 0.27)))


def test_what_was_written_is_read_back(write):
    run = load_config(Run, None, ["model=tiny", "learner.lr=3e-7"])
    assert load_config(Run, write(to_yaml(run))) == run


def test_a_file_may_extend_another(write):
    write("model: tiny\nseed: 1\nlearner: {lr: 0.1}\n", "base.yaml")
    run = load_config(Run, write("extends: base.yaml\nseed: 2\n"))
    assert (run.model, run.seed, run.learner.lr) == ("tiny", 2, 0.1)


def test_files_that_extend_each_other_are_refused(write):
    write("extends: run.yaml\n", "base.yaml")
    with pytest.raises(ConfigError, match="extends itself"):
        load_config(Run, write("extends: base.yaml\n"))


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            "model: m\nlearner:\n  lrr: 1\n",
            [],
            r"run.yaml:3: there is no key learner.lrr; did you mean learner.lr\?",
        ),
        ("model: m\nlr: 1\n", [], r"run.yaml:2: there is no key lr; did you mean learner.lr\?"),
        (
            "model: m\nqqq: 1\n",
            [],
            "run.yaml:2: there is no key qqq; the keys there are model, seed, learner",
        ),
        ("model: m\nlearner:\n  clip:\n    low: x\n", [], "run.yaml:4: learner.clip.low: Value 'x'"),
        ("model: m\nlearner: 3\n", [], "run.yaml:2: learner is a section with the keys lr, betas, clip"),
        (
            "model: m\nlearner:\n  clip:\n    low: 9\n",
            [],
            "run.yaml:4: low must not exceed high, got 9.0",
        ),
        (
            "model: m\n",
            ["learner.clip.hi=1"],
            "override 'learner.clip.hi=1': there is no key learner.clip.hi",
        ),
        ("model: m\n", ["seed=a"], "override 'seed=a': seed: Value 'a'"),
        ("model: m\n", ["seed"], "override 'seed': write it as section.key=value"),
        ("seed: 1\n", [], "model has no value"),
        ("", [], "model has no value"),
        ("- a\n", [], "not a ListConfig"),
        ("model: [\n", [], "is not YAML"),
        ("model: m\nseed: 1\nseed: 2\n", [], "duplicate key"),
        ("model: m\nseed: ${nowhere}\n", [], "nowhere"),
    ],
)
def test_a_mistake_is_one_line_that_says_where(write, text, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(Run, write(text), overrides)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True, slots=True)
class Pair:
    seed: int = 0
    learner: Learner = field(default_factory=Learner)
    name: str = "pair"

    def __post_init__(self) -> None:
        if self.seed > self.learner.lr:
            raise ValueError(f"seed is {self.seed}, above learner.lr ({self.learner.lr})")


def test_a_mistake_between_sections_is_placed_where_one_of_them_was_set(write):
    with pytest.raises(ConfigError, match=r"^override 'seed=9': seed is 9, above learner.lr \(1e-06\)$"):
        load_config(Pair, write("seed: 1\n"), ["seed=9", "name=other"])
    with pytest.raises(ConfigError, match=r"run.yaml:3: seed is 1, above learner.lr \(0.5\)$"):
        load_config(Pair, write("name: x\nlearner: {lr: 0.5}\nseed: 1\n"), ["name=other"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml: No such file"):
        load_config(Run, tmp_path / "nowhere.yaml")


def test_keys_are_listed_in_order():
    assert list_keys(Run) == [
        "model",
        "seed",
        "learner.lr",
        "learner.betas",
        "learner.clip.low",
        "learner.clip.high",
    ]
