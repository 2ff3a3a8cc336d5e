"""Failed writes of atomic files and directories."""

from __future__ import annotations

import errno

import pytest

from vz_ray.utils import atomic_files
from vz_ray.utils.atomic_files import atomic_directory, write_atomic


def test_full_disk_is_reported_with_the_path(tmp_path, monkeypatch):
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_files.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomic(tmp_path / "a.json", b"{}")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a.json"))
    assert not list(tmp_path.iterdir())


def test_failed_block_deletes_its_directory(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "a") as partial:
        (partial / "missing/file").write_text("x")
    assert not list(tmp_path.iterdir())
