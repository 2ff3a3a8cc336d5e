"""The working directory of a job: what goes along, how much it is, and that it is the same every time."""

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
    """A repository with a tracked, an untracked and an ignored file, a run and a link out of it."""
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


def test_what_git_knows_or_would_add_goes_along(checkout: Path) -> None:
    assert names(checkout) == [
        ".gitignore",
        "conf/a.yaml",
        "docs/picture.png",
        "name with spaces é.txt",
        "rewards.py",
    ]


def test_patterns_leave_out_files_and_whole_directories(checkout: Path) -> None:
    assert names(checkout, exclude=["docs", "*.txt"]) == [".gitignore", "conf/a.yaml", "rewards.py"]
    assert "docs/picture.png" not in names(checkout, exclude=["docs/"])
    assert "docs/picture.png" not in names(checkout, exclude=["docs/*.png"])


def test_outside_of_a_checkout_hidden_files_and_runs_stay(tmp_path: Path) -> None:
    for name in ("conf/a.yaml", ".env", ".venv/bin/python", "runs/x/y", "__pycache__/a.pyc", "data/t.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert names(tmp_path) == ["conf/a.yaml", "data/t.json"]


def test_a_tracked_file_that_was_deleted_is_not_missed(checkout: Path) -> None:
    (checkout / "conf/a.yaml").unlink()
    assert "conf/a.yaml" not in names(checkout)


def test_too_much_is_refused_with_the_heaviest(checkout: Path) -> None:
    (checkout / "data").mkdir()
    (checkout / "data/large.bin").write_bytes(b"\0" * 3 * 2**20)
    with pytest.raises(
        UserError, match=r"holds 3 MiB to send, above the limit of 1 MiB: data/ 3 MiB, docs/ 0 MiB"
    ):
        package_working_dir(checkout, limit_mib=1)


def test_nothing_and_nowhere_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is nothing to send in"):
        package_working_dir(tmp_path)
    with pytest.raises(UserError, match="there is no directory"):
        package_working_dir(tmp_path / "nowhere")


def test_the_same_files_make_the_same_bytes(checkout: Path, tmp_path: Path) -> None:
    (checkout / "rewards.py").chmod(0o755)
    first, second = tmp_path / "1.zip", tmp_path / "2.zip"
    package_working_dir(checkout).write(first)
    for path in checkout.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.utime(path, (1, 1))
    package_working_dir(checkout).write(second)
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as packed:
        assert packed.read("conf/a.yaml") == b"seed: 1\n"
        assert packed.getinfo("rewards.py").external_attr >> 16 == 0o755
        assert {PurePosixPath(name) for name in packed.namelist()} == set(package_working_dir(checkout).files)
