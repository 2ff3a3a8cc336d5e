"""Write docs/config.md: every config key with its default and one description.

python scripts/config_reference.py
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

PROJECT = Path(__file__).resolve().parents[1]
OUTPUT = PROJECT / "docs" / "config.md"

COMMANDS = {
    "train": "vz_ray.config.run.GrpoRunConfig",
    "sft": "vz_ray.config.sft.SftRunConfig",
    "quickstart": "vz_ray.config.quickstart.QuickstartConfig",
    "ablate": "vz_ray.config.ablation.AblationConfig",
    "eval": "vz_ray.config.eval_run.EvalRunConfig",
    "distill exemplar": "vz_ray.config.distill.ExemplarRunConfig",
    "distill reflect": "vz_ray.config.distill.ReflectionRunConfig",
    "serve": "vz_ray.config.serve.ServeConfig",
    "synth": "vz_ray.config.data.SynthConfig",
    "k8s render --site": "vz_ray.config.site.SiteConfig",
}
"""Config class of each command."""

INTRODUCTION = """\
# Configuration

Every command reads YAML files and `section.key=value` overrides:

```
vz-ray train conf/laptop.yaml model=runs/quickstart/models/cold_start train.max_steps=3
```

`--dry-run` prints the resolved config and exits. A file may extend another one with `extends: other.yaml`.
An unknown key, a wrong type or an invalid value stops the command with one line that names the file, the line
and the key.

Some values follow another key and cannot be set: an engine's `max_model_len` follows `episode.max_context`,
its `max_num_seqs` follows the concurrency of its worker, its `images_per_prompt` follows `episode.max_images`,
and the reward's `max_zoom_frames` follows `episode.max_zoom_frames`. All timeouts are in `timeouts`; those that are
null follow from the plan of the run ([planning.md](planning.md#timeouts)).

`python scripts/config_reference.py` writes this page.
"""


@dataclass(frozen=True)
class Key:
    """One config key: its name in the section, default in YAML notation, and description."""

    name: str
    default: str
    description: str


def render() -> str:
    """Return the page."""
    parts = [INTRODUCTION, "## Top-level keys\n"]
    for command, schema in schemas().items():
        keys = [key for key in section_keys(schema) if key.name]
        parts += [f"### `vz-ray {command}`\n", sections_line(schema), table(keys)]
    parts.append("## Sections\n")
    for section, places in section_prefixes().items():
        parts += [f"### {', '.join(f'`{prefix}`' for prefix in places)}\n", first_line(section), ""]
        parts.append(table(section_keys(section)))
    return "\n".join(parts).rstrip() + "\n"


def schemas() -> dict[str, type]:
    """Return the config class of each command."""
    classes = {}
    for command, path in COMMANDS.items():
        module, _, name = path.rpartition(".")
        classes[command] = getattr(importlib.import_module(module), name)
    return classes


def section_prefixes() -> dict[type, list[str]]:
    """Return every section class with the dotted prefixes at which commands use it."""
    prefixes: dict[type, list[str]] = {}

    def visit(schema: type, prefix: str) -> None:
        for name, section in subsections(schema):
            key = f"{prefix}{name}"
            places = prefixes.setdefault(section, [])
            if key not in places:
                places.append(key)
            visit(section, f"{key}.")

    for schema in schemas().values():
        visit(schema, "")
    return prefixes


def subsections(schema: type) -> Iterator[tuple[str, type]]:
    """Yield name and class of the fields that are sections."""
    hints = get_type_hints(schema)
    for item in fields(schema):  # type: ignore[arg-type]
        hint = hints[item.name]
        if is_dataclass(hint):
            yield item.name, hint  # type: ignore[misc]
        for argument in get_args(hint):
            if is_dataclass(argument):
                yield f"{item.name}.<name>", argument  # type: ignore[misc]


def sections_line(schema: type) -> str:
    names = [f"`{name}`" for name, _ in subsections(schema)]
    return f"Sections: {', '.join(names)}.\n" if names else ""


def section_keys(schema: type) -> list[Key]:
    """Return the keys of a section, without subsections and derived fields."""
    sections = {name for name, _ in subsections(schema)}
    descriptions = field_descriptions(schema)
    return [
        Key(item.name, default_text(item), descriptions[item.name])
        for item in fields(schema)  # type: ignore[arg-type]
        if item.name not in sections and "omegaconf_ignore" not in item.metadata
    ]


def field_descriptions(schema: type) -> dict[str, str]:
    """Return the string below each field, from the class and its bases."""
    descriptions: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if not is_dataclass(base):
            continue
        (node,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(node, ast.ClassDef)
        for statement, following in zip(node.body, node.body[1:], strict=False):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    descriptions[name] = " ".join(text.split())
    return descriptions


def default_text(item: Any) -> str:
    value = item.default_factory() if item.default is MISSING else item.default
    return yaml_text(value)


def yaml_text(value: object) -> str:
    """Return a value in YAML flow notation."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value or "''"
    if isinstance(value, list):
        return f"[{', '.join(map(yaml_text, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {yaml_text(item)}" for key, item in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def table(keys: list[Key]) -> str:
    if not keys:
        return ""
    rows = ["| key | default | description |", "|---|---|---|"]
    rows += [f"| `{key.name}` | {cell(key.default)} | {escape(key.description)} |" for key in keys]
    return "\n".join(rows) + "\n"


def cell(default: str) -> str:
    return f"`{escape(default)}`"


def escape(text: str) -> str:
    return text.replace("|", "\\|")


def first_line(section: type) -> str:
    return (inspect.getdoc(section) or "").splitlines()[0]


if __name__ == "__main__":
    sys.path.insert(0, str(PROJECT))
    OUTPUT.write_text(render(), encoding="utf-8")
    print(f"wrote {OUTPUT}")
