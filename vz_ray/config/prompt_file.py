"""Prompt files: YAML mappings of texts that users edit."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import yaml

from vz_ray.utils.errors import UserError
from vz_ray.utils.resources import find_resource


def load_prompt_file(
    path: Path | str, keys: Collection[str], optional: Collection[str] = ()
) -> tuple[Path, dict[str, str]]:
    """Return the path of a prompt file and its texts by key.

    Args:
        path: A relative path is resolved in the working directory, then in the files that ship with vz_ray.
        keys: Required keys.
        optional: Optional keys.

    Raises:
        UserError: The file is missing or invalid.
    """
    path = find_resource(path)
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
