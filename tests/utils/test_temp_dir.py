"""Temporary directories, also of killed processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vz_ray.utils.temp_dir import temp_dir

HOLD_SCRIPT = """
import sys
from pathlib import Path
from vz_ray.utils.temp_dir import temp_dir
with temp_dir("run_", Path(sys.argv[1])) as folder:
    (folder / "big").write_bytes(bytes(1000))
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_directory_is_removed_with_the_block(tmp_path: Path):
    with temp_dir("run_", tmp_path) as folder:
        (folder / "inside").mkdir()
        assert folder.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_only_leftovers_of_killed_processes_are_removed(tmp_path: Path):
    command = [sys.executable, "-c", HOLD_SCRIPT, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        leftover = Path(process.stdout.readline().strip())
        with temp_dir("run_", tmp_path) as own:
            assert leftover.is_dir()
        process.kill()
        process.wait()
    assert (leftover / "big").is_file()
    (tmp_path / "run_of_another_program").mkdir()
    with temp_dir("run_", tmp_path) as own:
        assert sorted(tmp_path.iterdir()) == sorted([own, tmp_path / "run_of_another_program"])
