"""Prompt files: YAML mappings of texts, which a user edits."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import yaml

from vz_ray.utils.errors import UserError

_HOME = Path(__file__).resolve().parents[2]
"""Where the files that ship lie, whatever the working directory."""


def load_prompt_file(
    path: Path | str, keys: Collection[str], optional: Collection[str] = ()
) -> tuple[Path, dict[str, str]]:
    """Where a prompt file was found, and its texts by key.

    Args:
        path: Relative paths are looked for in the working directory, then beside the files that ship.
        keys: What it must have.
        optional: What it may have besides.

    Raises:
        UserError: It is missing or no YAML, or its keys are others, or not all of them are texts.
    """
    path = Path(path)
    if not path.is_absolute() and not path.exists():
        path = _HOME / path
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"prompt file {path} does not exist: correct its name") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the prompt file {path}: {' '.join(str(error).split())}") from error
    found = set(values) if isinstance(values, dict) else set()
    if found - set(optional) != set(keys):
        more = f", and may be {', '.join(optional)}" if optional else ""
        there = ", ".join(map(str, values)) if found else type(values).__name__
        raise UserError(f"prompt file {path}: its keys must be {', '.join(keys)}{more}; found {there}")
    for key, text in values.items():
        if not isinstance(text, str):
            raise UserError(f"prompt file {path}: {key} {text!r} is no text; put it in quotes")
    return path, values
