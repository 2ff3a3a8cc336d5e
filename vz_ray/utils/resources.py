"""Files that ship with vz_ray: `conf/` and `assets/`, in the checkout or inside the installed package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_ROOTS = (_PACKAGE.parent, _PACKAGE)
"""A checkout has `conf/` beside the package; a wheel has it inside the package."""
_FOLDERS = ("conf", "assets")


def find_resource(path: Path | str) -> Path:
    """Return `path` if it exists, otherwise the shipped file of that name, otherwise `path` unchanged.

    Args:
        path: For example `conf/laptop.yaml`; a relative path is resolved in the working directory first.
    """
    path = Path(path)
    return path if path.exists() else find_shipped(path) or path


def find_shipped(path: Path | str) -> Path | None:
    """Return the shipped file or folder of a relative path such as `conf/laptop.yaml`; None if there is none."""
    path = Path(path)
    if path.is_absolute() or not path.parts or path.parts[0] not in _FOLDERS:
        return None
    return next((root / path for root in _ROOTS if (root / path).exists()), None)
