from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vz_ray.utils.temp_dir import temp_dir

HOLD = """
import sys
from pathlib import Path
from vz_ray.utils.temp_dir import scratch
with scratch("run_", Path(sys.argv[1])) as folder:
    (folder / "big").write_bytes(bytes(1000))
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_it_goes_with_its_block(tmp_path: Path):
    with temp_dir("run_", tmp_path) as folder:
        (folder / "inside").mkdir()
        assert folder.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(tmp_path: Path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        theirs = Path(other.stdout.readline().strip())
        with temp_dir("run_", tmp_path) as ours:
            assert theirs.is_dir()
        other.kill()
        other.wait()
    assert (theirs / "big").is_file()
    (tmp_path / "run_of_somebody_else").mkdir()
    with temp_dir("run_", tmp_path) as ours:
        assert sorted(tmp_path.iterdir()) == sorted([ours, tmp_path / "run_of_somebody_else"])
