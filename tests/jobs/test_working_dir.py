"""Packaging of a job's working directory: selected files, size limit, reproducible zip file."""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from vz_ray.jobs.working_dir import package_working_dir
from vz_ray.utils.errors import UserError


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Git repository with tracked, untracked and ignored files, a run directory and symbolic links."""
    folder = tmp_path / "work"
    for name, text in {
        "conf/a.yaml": "seed: 1\n",
        "rewards.py": "def score(): ...\n",
        ".gitignore": "*.mp4\n",
        "talk.mp4": "x" * 4096,
        "runs/long/config.yaml": "name: long\n",
        "docs/picture.png": "y" * 2048,
        "name with spaces é.txt": "z",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (tmp_path / "secret").write_text("elsewhere")
    git(folder, "init", "-q")
    git(folder, "add", "conf", ".gitignore")
    os.symlink(tmp_path / "gone", folder / "dangling")
    os.symlink(folder / "conf", folder / "conf_again")
    return folder


def names(folder: Path, **options: object) -> list[str]:
    return [str(name) for name in package_working_dir(folder, **options).files]


def test_tracked_and_untracked_files_are_included(checkout: Path) -> None:
    assert names(checkout) == [
        ".gitignore",
        "conf/a.yaml",
        "docs/picture.png",
        "name with spaces é.txt",
        "rewards.py",
    ]


def test_patterns_exclude_files_and_directories(checkout: Path) -> None:
    assert names(checkout, exclude=["docs", "*.txt"]) == [".gitignore", "conf/a.yaml", "rewards.py"]
    assert "docs/picture.png" not in names(checkout, exclude=["docs/"])
    assert "docs/picture.png" not in names(checkout, exclude=["docs/*.png"])


def test_hidden_files_and_runs_are_excluded_without_git(tmp_path: Path) -> None:
    for name in ("conf/a.yaml", ".env", ".venv/bin/python", "runs/x/y", "__pycache__/a.pyc", "data/t.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert names(tmp_path) == ["conf/a.yaml", "data/t.json"]


def test_deleted_tracked_file_is_skipped(checkout: Path) -> None:
    (checkout / "conf/a.yaml").unlink()
    assert "conf/a.yaml" not in names(checkout)


def test_size_limit_error_names_largest_files(checkout: Path) -> None:
    (checkout / "data").mkdir()
    (checkout / "data/large.bin").write_bytes(b"\0" * 3 * 2**20)
    with pytest.raises(UserError, match=r"3 MiB to upload; the limit is 1 MiB\. Largest: data/ 3 MiB, docs/ 0 MiB"):
        package_working_dir(checkout, limit_mib=1)


def test_empty_and_missing_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no files to upload"):
        package_working_dir(tmp_path)
    with pytest.raises(UserError, match="nowhere does not exist"):
        package_working_dir(tmp_path / "nowhere")


def test_zip_file_is_reproducible(checkout: Path, tmp_path: Path) -> None:
    (checkout / "rewards.py").chmod(0o755)
    first, second = tmp_path / "1.zip", tmp_path / "2.zip"
    package_working_dir(checkout).write(first)
    for path in checkout.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.utime(path, (1, 1))
    package_working_dir(checkout).write(second)
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert archive.read("conf/a.yaml") == b"seed: 1\n"
        assert archive.getinfo("rewards.py").external_attr >> 16 == 0o755
        assert {PurePosixPath(name) for name in archive.namelist()} == set(package_working_dir(checkout).files)
