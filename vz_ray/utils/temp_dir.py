"""Temporary directories that are also removed after their process was killed."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"


@contextmanager
def temp_dir(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Create `<parent>/<prefix>...` and remove it when the block ends.

    Directories with the same prefix whose processes were killed are removed first. A kernel lock inside
    distinguishes them from directories in use.

    Args:
        parent: Parent directory. Default: the system's directory for temporary files.
    """
    parent = parent or Path(tempfile.gettempdir())
    for path in parent.glob(f"{prefix}*"):
        _remove_if_unused(path)
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    with open(path / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _remove_if_unused(path: Path) -> None:
    try:
        with open(path / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
    except OSError:
        return  # in use, being created, or not a directory of `temp_dir`
