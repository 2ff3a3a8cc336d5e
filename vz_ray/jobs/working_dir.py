"""The working directory of a job: which files go along, how large they are, and one file of them.

In a git checkout these are the files that git knows or would add; elsewhere all but hidden ones and those
that a run or an installation makes. The same files always make the same bytes, which a cluster stores once.
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
"""What never goes along."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
_LARGEST = 5
_GIT_S = 60


@dataclass(frozen=True, slots=True)
class WorkingDirPackage:
    """The files that go along.

    Attributes:
        root: Their directory.
        files: Paths below it, in order.
        file_sizes: Their sizes.
    """

    root: Path
    files: tuple[PurePosixPath, ...]
    file_sizes: tuple[int, ...]

    @property
    def total_bytes(self) -> int:
        return sum(self.file_sizes)

    def write(self, path: Path) -> None:
        """Makes a zip file of them, the same for the same contents and modes."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for name in self.files:
                source = self.root / name
                entry = zipfile.ZipInfo(str(name), _EPOCH)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = (0o755 if source.stat().st_mode & 0o100 else 0o644) << 16
                packed.writestr(entry, source.read_bytes())

    def largest(self) -> list[tuple[str, int]]:
        """The files and top directories that weigh most, heaviest first."""
        weights: Counter[str] = Counter()
        for name, size in zip(self.files, self.file_sizes, strict=True):
            weights[f"{name.parts[0]}/" if len(name.parts) > 1 else str(name)] += size
        return weights.most_common(_LARGEST)


def package_working_dir(
    root: Path, *, exclude: Sequence[str] = (), limit_mib: float = 100.0
) -> WorkingDirPackage:
    """What is in a directory and goes along.

    Args:
        root: The directory.
        exclude: Further patterns of files and directories that stay: `data`, `*.mp4`, `docs/*.png`.
        limit_mib: Most that all files together may weigh.

    Raises:
        UserError: There is no such directory, nothing is in it, or too much; names the heaviest.
    """
    if not root.is_dir():
        raise UserError(f"there is no directory {root}: give the job's working directory")
    patterns = (*ALWAYS_EXCLUDED, *exclude)
    names = [name for name in _listed(root) if not _left_out(name, patterns)]
    # A link out of the directory, or one to a directory, has no bytes of its own to send.
    found = sorted(name for name in names if (root / name).is_file())
    if not found:
        raise UserError(f"there is nothing to send in {root}")
    package = WorkingDirPackage(root, tuple(found), tuple((root / name).stat().st_size for name in found))
    if package.total_bytes > limit_mib * MIB:
        heavy = ", ".join(f"{name} {size / MIB:.0f} MiB" for name, size in package.largest())
        raise UserError(
            f"{root} holds {package.total_bytes / MIB:.0f} MiB to send, above the limit of {limit_mib:g} MiB: "
            f"{heavy}; leave some out with --exclude or in .gitignore (videos and models belong on a volume "
            "of the cluster), or raise --limit-mib"
        )
    return package


def _listed(root: Path) -> list[PurePosixPath]:
    """Files as git lists them; every file where this is no checkout."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_GIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if done is not None and done.returncode == 0:
        return [PurePosixPath(name) for name in done.stdout.decode().split("\0") if name]
    below = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return [PurePosixPath(path) for path in below if not any(part.startswith(".") for part in path.parts)]


def _left_out(name: PurePosixPath, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches the path, or the name of a part of it."""
    return any(
        fnmatch(str(name), pattern) or any(fnmatch(part, pattern.rstrip("/")) for part in name.parts)
        for pattern in patterns
    )
