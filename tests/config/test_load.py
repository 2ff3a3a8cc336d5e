from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from vz_ray.config import ConfigError, load_config, to_yaml
from vz_ray.config.fields import InvalidValueError, Section, choice, derived, set_derived_values
from vz_ray.config.load import list_keys, restore_config


@dataclass(frozen=True, slots=True)
class Clip:
    low: float = 0.2
    high: float = 0.27

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise InvalidValueError("low", f"is {self.low}; it must be at most high ({self.high})", "high")


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


def test_overrides_precede_file_and_file_precedes_defaults(write):
    path = write("model: tiny\nseed: 1\nlearner:\n  lr: 1e-5\n  clip: {low: 0.1}\n")
    run = load_config(Run, path, ["seed=2", "learner.betas=[0.5, 0.6]"])
    assert run == Run("tiny", 2, Learner(1e-5, [0.5, 0.6], Clip(0.1, 0.27)))


def test_written_config_is_read_back(write):
    run = load_config(Run, None, ["model=tiny", "learner.lr=3e-7"])
    assert load_config(Run, write(to_yaml(run))) == run


def test_file_extends_another_file(write):
    write("model: tiny\nseed: 1\nlearner: {lr: 0.1}\n", "base.yaml")
    run = load_config(Run, write("extends: base.yaml\nseed: 2\n"))
    assert (run.model, run.seed, run.learner.lr) == ("tiny", 2, 0.1)


def test_circular_extends_is_rejected(write):
    write("extends: run.yaml\n", "base.yaml")
    with pytest.raises(ConfigError, match="extends itself"):
        load_config(Run, write("extends: base.yaml\n"))


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            "model: m\nlearner:\n  lrr: 1\n",
            [],
            r"run.yaml:3: unknown key learner.lrr; did you mean learner.lr\?",
        ),
        ("model: m\nlr: 1\n", [], r"run.yaml:2: unknown key lr; did you mean learner.lr\?"),
        (
            "model: m\nqqq: 1\n",
            [],
            "run.yaml:2: unknown key qqq; the keys there are model, seed, learner",
        ),
        ("model: m\nlearner:\n  clip:\n    low: x\n", [], "run.yaml:4: learner.clip.low: Value 'x'"),
        ("model: m\nlearner: 3\n", [], "run.yaml:2: learner is a section with the keys lr, betas, clip"),
        (
            "model: m\nlearner:\n  clip:\n    low: 9\n",
            [],
            r"run.yaml:4: learner.clip.low is 9.0; it must be at most high \(0.27\)",
        ),
        (
            "model: m\n",
            ["learner.clip.hi=1"],
            "override 'learner.clip.hi=1': unknown key learner.clip.hi",
        ),
        ("model: m\n", ["seed=a"], "override 'seed=a': seed: Value 'a'"),
        ("model: m\n", ["seed"], "override 'seed': write it as section.key=value"),
        ("seed: 1\n", [], "model has no value"),
        ("", [], "model has no value"),
        ("- a\n", [], "contains a ListConfig"),
        ("model: [\n", [], "is not YAML"),
        ("model: m\nseed: 1\nseed: 2\n", [], "duplicate key"),
        ("model: m\nseed: ${nowhere}\n", [], "nowhere"),
    ],
)
def test_error_is_one_line_with_location(write, text, overrides, message):
    with pytest.raises(ConfigError, match=message) as error_info:
        load_config(Run, write(text), overrides)
    assert "\n" not in str(error_info.value)


@dataclass(frozen=True, slots=True)
class Pair:
    seed: int = 0
    learner: Learner = field(default_factory=Learner)
    name: str = "pair"

    def __post_init__(self) -> None:
        if self.seed > self.learner.lr:
            raise InvalidValueError("seed", f"is {self.seed}; it must be at most learner.lr", "learner.lr")


def test_error_of_two_keys_names_location_of_last_override(write):
    with pytest.raises(ConfigError, match=r"^override 'seed=9': seed is 9; it must be at most learner.lr$"):
        load_config(Pair, write("seed: 1\n"), ["seed=9", "name=other"])
    with pytest.raises(ConfigError, match=r"run.yaml:3: seed is 1; it must be at most learner.lr$"):
        load_config(Pair, write("name: x\nlearner: {lr: 0.5}\nseed: 1\n"), ["name=other"])
    with pytest.raises(ConfigError, match=r"run.yaml:2: seed is 0; it must be at most learner.lr$"):
        load_config(Pair, write("name: x\nlearner: {lr: -0.5}\n"))


@dataclass
class Engine:
    threads: int = 1
    max_len: int = derived(8, "max_context")


@dataclass
class Server:
    max_context: int = 16
    engine: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        set_derived_values(self)


def test_derived_field_follows_its_key(write):
    assert load_config(Server, write("max_context: 32\n")).engine.max_len == 32
    assert Server(max_context=4).engine.max_len == 4


def test_derived_field_is_no_key(write):
    assert list_keys(Server) == ["max_context", "engine.threads"]
    assert to_yaml(Server()) == "max_context: 16\nengine:\n  threads: 1\n"
    with pytest.raises(ConfigError, match=r"run.yaml:2: engine.max_len follows max_context; set that instead"):
        load_config(Server, write("engine:\n  max_len: 3\n"))


def test_restored_config_keeps_derived_values():
    engine = Engine(threads=2, max_len=99)
    assert restore_config(Engine, asdict(engine)) == engine
    server = restore_config(Server, asdict(Server(max_context=5)))
    assert (server.max_context, server.engine.max_len) == (5, 5)


def test_missing_file_is_named(tmp_path):
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


@dataclass
class Mode(Section):
    mode: str = choice("auto", "on", "off")
    other: str = choice("a", "b")


def test_unquoted_on_and_off_are_choices(write):
    assert [load_config(Mode, None, [f"mode={value}"]).mode for value in ("on", "off", "auto")] == ["on", "off", "auto"]
    assert load_config(Mode, write("mode: off")).mode == "off"
    with pytest.raises(ConfigError, match=r"other is 'True'; it must be one of a, b"):
        load_config(Mode, None, ["other=on"])
