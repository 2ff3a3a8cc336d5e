"""Working directory of a job, packaged as a zip file.

In a git checkout it contains the tracked files and the untracked ones that git does not ignore. Elsewhere it
contains all files except hidden ones and the outputs of runs and installations. Equal files produce an
identical zip file, which the cluster stores once.
"""

from __future__ import annotations

import subprocess
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from vz_ray.utils.errors import UserError

MIB = 1 << 20
ALWAYS_EXCLUDED = (".git", ".venv", "venv", "runs", "__pycache__", "*.egg-info", "node_modules")
"""Patterns that are always excluded."""
_ZIP_TIMESTAMP = (1980, 1, 1, 0, 0, 0)
_NUM_LARGEST = 5
_GIT_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class WorkingDirPackage:
    """Files of the working directory.

    Attributes:
        root: The directory.
        files: Relative paths, sorted.
        file_sizes: Size of each file, bytes.
    """

    root: Path
    files: tuple[PurePosixPath, ...]
    file_sizes: tuple[int, ...]

    @property
    def total_bytes(self) -> int:
        return sum(self.file_sizes)

    def contains(self, path: str) -> bool:
        """Return whether a relative path is one of the files, or a directory of some."""
        name = PurePosixPath(path)
        return any(name == file or name in file.parents for file in self.files)

    def write(self, path: Path) -> None:
        """Write the zip file. Equal contents and modes produce identical bytes."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in self.files:
                source = self.root / name
                entry = zipfile.ZipInfo(str(name), _ZIP_TIMESTAMP)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = (0o755 if source.stat().st_mode & 0o100 else 0o644) << 16
                archive.writestr(entry, source.read_bytes())

    def largest(self) -> list[tuple[str, int]]:
        """Return the largest files and top-level directories, largest first."""
        sizes: Counter[str] = Counter()
        for name, size in zip(self.files, self.file_sizes, strict=True):
            sizes[f"{name.parts[0]}/" if len(name.parts) > 1 else str(name)] += size
        return sizes.most_common(_NUM_LARGEST)


def package_working_dir(root: Path, *, exclude: Sequence[str] = (), limit_mib: float = 100.0) -> WorkingDirPackage:
    """Select the files of a working directory.

    Args:
        root: The directory.
        exclude: Patterns of files and directories to exclude: `data`, `*.mp4`, `docs/*.png`.
        limit_mib: Maximum total size.

    Raises:
        UserError: The directory is missing, empty or too large; the error names the largest files.
    """
    if not root.is_dir():
        raise UserError(f"the working directory {root} does not exist; give an existing one with --working-dir")
    patterns = (*ALWAYS_EXCLUDED, *exclude)
    names = [name for name in _list_files(root) if not _is_excluded(name, patterns)]
    # is_file() skips links to directories and broken links.
    files = sorted(name for name in names if (root / name).is_file())
    if not files:
        raise UserError(f"the working directory {root} contains no files to upload")
    package = WorkingDirPackage(root, tuple(files), tuple((root / name).stat().st_size for name in files))
    if package.total_bytes > limit_mib * MIB:
        largest = ", ".join(f"{name} {size / MIB:.0f} MiB" for name, size in package.largest())
        raise UserError(
            f"{root} has {package.total_bytes / MIB:.0f} MiB to upload; the limit is {limit_mib:g} MiB. Largest: "
            f"{largest}. Exclude files with --exclude or .gitignore (videos and models belong on a volume of the "
            "cluster), or raise --limit-mib"
        )
    return package


def _list_files(root: Path) -> list[PurePosixPath]:
    """Return the files that git lists; outside of a checkout, all files that are not hidden."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        result = subprocess.run(command, capture_output=True, timeout=_GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        result = None
    if result is not None and result.returncode == 0:
        return [PurePosixPath(name) for name in result.stdout.decode().split("\0") if name]
    paths = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return [PurePosixPath(path) for path in paths if not any(part.startswith(".") for part in path.parts)]


def _is_excluded(name: PurePosixPath, patterns: Sequence[str]) -> bool:
    """Return True if a pattern matches the path or one of its parts."""
    return any(
        fnmatch(str(name), pattern) or any(fnmatch(part, pattern.rstrip("/")) for part in name.parts)
        for pattern in patterns
    )
