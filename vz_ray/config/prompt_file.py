"""Prompt files: YAML mappings of texts that users edit."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import yaml

from vz_ray.utils.errors import UserError

_PROJECT_ROOT = Path(__file__).resolve().parents[2]
"""Directory of the `conf` folder."""


def load_prompt_file(
    path: Path | str, keys: Collection[str], optional: Collection[str] = ()
) -> tuple[Path, dict[str, str]]:
    """Return the path of a prompt file and its texts by key.

    Args:
        path: A relative path is resolved in the working directory, then in the project.
        keys: Required keys.
        optional: Optional keys.

    Raises:
        UserError: The file is missing or invalid.
    """
    path = Path(path)
    if not path.is_absolute() and not path.exists():
        path = _PROJECT_ROOT / path
    try:
        texts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"prompt file {path} does not exist: correct its name") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the prompt file {path}: {' '.join(str(error).split())}") from error
    file_keys = set(texts) if isinstance(texts, dict) else set()
    if file_keys - set(optional) != set(keys):
        actual = ", ".join(map(str, texts)) if file_keys else type(texts).__name__
        extra = f" and may be {', '.join(optional)}" if optional else ""
        raise UserError(f"prompt file {path} has {actual}; its keys must be {', '.join(keys)}{extra}")
    for key, text in texts.items():
        if not isinstance(text, str):
            raise UserError(f"prompt file {path}: {key} is {text!r}; it must be a text, put it in quotes")
    return path, texts
