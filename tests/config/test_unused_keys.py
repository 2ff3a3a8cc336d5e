"""Every config key is read by some code, and every section belongs to a command."""

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
from vz_ray.config import fields as fields_module
from vz_ray.config.ablation import AblationConfig
from vz_ray.config.data import SynthConfig
from vz_ray.config.distill import ExemplarRunConfig, ReflectionRunConfig
from vz_ray.config.eval_run import EvalRunConfig
from vz_ray.config.fields import SOURCE
from vz_ray.config.quickstart import QuickstartConfig
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.config.site import SiteConfig

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
    SiteConfig,
)
"""Configs of the commands."""


def sections() -> set[type]:
    """Return every section of vz_ray.config."""
    modules = [importlib.import_module(f"vz_ray.config.{m.name}") for m in pkgutil.iter_modules(vz_ray.config.__path__)]
    return {
        value
        for module in modules
        if module is not fields_module
        for name, value in vars(module).items()
        if is_dataclass(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }


def inside(section: type) -> Iterator[type]:
    """Yield a section and its subsections."""
    yield section
    for hint in get_type_hints(section).values():
        for kind in (hint, *get_args(hint)):
            if is_dataclass(kind):
                yield from inside(kind)


def own_keys(section: type) -> Iterator[tuple[str, str]]:
    """Yield (class, key) of the keys that a section does not inherit."""
    inherited = {f.name for base in section.__mro__[1:] if is_dataclass(base) for f in fields(base)}
    for field in fields(section):
        if field.name not in inherited:
            yield f"{section.__module__}.{section.__qualname__}", field.name


def timeout_keys() -> set[str]:
    """Return the keys of the `timeouts` section that a derived field follows."""
    sources = [item.metadata.get(SOURCE, "") for section in sections() for item in fields(section)]
    return {source.removeprefix("timeouts.") for source in sources if source.startswith("timeouts.")}


@pytest.mark.integration  # type-checks the whole package
def test_every_config_key_is_read():
    read = fields_read(Path(vz_ray.__file__).parent)
    # Derived fields read the timeouts.
    derived = {"timeouts", *timeout_keys()}
    unread = [
        f"{owner}.{key}"
        for section in sections()
        for owner, key in own_keys(section)
        if (owner, key) not in read and key not in derived
    ]
    assert not unread, f"config keys that no code reads: {', '.join(sorted(unread))}"


def test_every_section_belongs_to_a_command():
    parts = {part for command in COMMANDS for part in inside(command)}
    unreachable = sections() - {base for part in parts for base in part.__mro__}
    assert not unreachable, f"sections of no command: {', '.join(sorted(s.__name__ for s in unreachable))}"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a package with two classes that share a key name; one key is read."""
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


def test_usage_differs_by_class_and_ignores_checks_and_writes(package):
    read = {key for key in fields_read(package) if key[0].startswith("small.")}
    assert read == {("small.config.Outer", "inner"), ("small.config.Inner", "seed")}
