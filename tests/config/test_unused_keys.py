"""A config key that nothing reads is a promise that nothing keeps."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import vz_ray
import vz_ray.config
from tests.config.field_usage import fields_read
from vz_ray.config.ablation import AblationConfig
from vz_ray.config.data import SynthConfig
from vz_ray.config.distill import ExemplarRunConfig, ReflectionRunConfig
from vz_ray.config.eval_run import EvalRunConfig
from vz_ray.config.quickstart import QuickstartConfig
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.config.sft import SftRunConfig

COMMANDS = (
    GrpoRunConfig,
    SftRunConfig,
    QuickstartConfig,
    AblationConfig,
    SynthConfig,
    EvalRunConfig,
    ExemplarRunConfig,
    ReflectionRunConfig,
    ServeConfig,
)
"""What a command's file and overrides are read into."""


def sections() -> set[type]:
    """Every dataclass in vz_ray/config."""
    modules = [
        importlib.import_module(f"vz_ray.config.{m.name}")
        for m in pkgutil.iter_modules(vz_ray.config.__path__)
    ]
    return {
        value
        for module in modules
        for name, value in vars(module).items()
        if is_dataclass(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }


def inside(section: type) -> Iterator[type]:
    """A section and the sections within it."""
    yield section
    for hint in get_type_hints(section).values():
        for kind in (hint, *get_args(hint)):
            if is_dataclass(kind):
                yield from inside(kind)


def own_keys(section: type) -> Iterator[tuple[str, str]]:
    """(owner, key) of the keys that a section does not inherit."""
    inherited = {f.name for base in section.__mro__[1:] if is_dataclass(base) for f in fields(base)}
    for field in fields(section):
        if field.name not in inherited:
            yield f"{section.__module__}.{section.__qualname__}", field.name


def test_every_config_key_is_read_somewhere():
    read = fields_read(Path(vz_ray.__file__).parent)
    unread = sorted(".".join(key) for s in sections() for key in own_keys(s) if key not in read)
    assert not unread, f"config keys that nothing reads: {', '.join(unread)}"


def test_every_section_can_be_set_by_some_command():
    # What several commands' configs inherit from is set by each of them.
    parts = {part for command in COMMANDS for part in inside(command)}
    unreachable = sections() - {base for part in parts for base in part.__mro__}
    assert not unreachable, f"no command's config holds {', '.join(sorted(s.__name__ for s in unreachable))}"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes with keys of the same name, of which only one is read."""
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "config.py").write_text(
        "from dataclasses import dataclass, field\n"
        "@dataclass\nclass Inner:\n    seed: int = 0\n    size: int = 0\n    rate: int = 0\n"
        "    def __post_init__(self) -> None:\n        assert self.size\n"
        "@dataclass\nclass Outer:\n    seed: int = 0\n    inner: Inner = field(default_factory=Inner)\n"
    )
    (folder / "use.py").write_text(
        "from dataclasses import replace\nfrom small.config import Outer\n"
        "def use(config: Outer | None) -> int:\n    assert config\n"
        "    config.inner.rate = 1\n    return replace(config, seed=2).inner.seed\n"
    )
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_key_is_told_from_its_namesake_and_a_read_from_a_check_or_a_write(package):
    read = {key for key in fields_read(package) if key[0].startswith("small.")}
    assert read == {("small.config.Outer", "inner"), ("small.config.Inner", "seed")}
