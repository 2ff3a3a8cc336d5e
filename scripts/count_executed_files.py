"""Count the files of vz_ray that run from `vz-ray train` to the first gradient, and during one weight publish.

    python scripts/count_executed_files.py conf/laptop.yaml model=assets/tiny-base data.train=data/needle/train.json

Runs one training step of the given config with a profiler in every process. A file counts if one of its functions
runs; importing it does not count. Prints one JSON object as its last line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PROFILER = """
import atexit, inspect, os, sys, threading
_out = os.environ["VZ_RAY_COUNT_DIR"]
_gradient, _publish = os.path.join(_out, "first-gradient"), os.path.join(_out, "publish")
_seen = {"gradient": set(), "publish": set()}
_PACKAGE = os.sep + "vz_ray" + os.sep
_LOOPS = (os.path.join("training", "loop.py"), os.path.join("vz_ray", "train.py"))
_file = os.path.join(_out, f"{os.getpid()}.txt")

def _record(phase, name):
    if name not in _seen[phase]:
        _seen[phase].add(name)
        with open(_file, "a") as out:
            out.write(f"{phase} {name}\\n")

def _touch(path):
    if not os.path.exists(path) and not os.path.exists(path + ".done"):
        open(path, "w").close()

def _profile(frame, event, argument):
    if event != "call":
        return
    code = frame.f_code
    name = code.co_filename
    if code.co_name == "backward" and name.endswith("deepspeed/runtime/engine.py"):
        _touch(_gradient)
    start = name.rfind(_PACKAGE)
    if start < 0 or "site-packages" in name or code.co_name.startswith("<module"):
        return
    if not code.co_flags & inspect.CO_NEWLOCALS:
        return
    short = name[start + len(_PACKAGE):]
    if code.co_name == "publish" and short.startswith("rollout"):
        _touch(_publish)
    elif name.endswith(_LOOPS) and not code.co_flags & inspect.CO_COROUTINE and os.path.exists(_publish):
        os.rename(_publish, _publish + ".done")
    if code.co_qualname.endswith(">") and code.co_name in ("<listcomp>", "<genexpr>", "<lambda>"):
        return
    if not os.path.exists(_gradient):
        _record("gradient", short)
    if os.path.exists(_publish):
        _record("publish", short)

sys.setprofile(_profile)
threading.setprofile(_profile)
"""


def count(arguments: list[str]) -> dict[str, object]:
    """Run one training step; return counts and file names of both phases."""
    with tempfile.TemporaryDirectory(prefix="vz_ray_count_") as folder:
        (Path(folder) / "sitecustomize.py").write_text(PROFILER)
        output = Path(folder) / "files"
        output.mkdir()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([folder, str(ROOT)]),
            "VZ_RAY_COUNT_DIR": str(output),
        }
        command = [sys.executable, "-m", "vz_ray.cli", "train", *arguments, f"runs={folder}/runs"]
        subprocess.run(command, env=environment, cwd=ROOT, check=True)
        files: dict[str, set[str]] = {"gradient": set(), "publish": set()}
        for path in output.glob("*.txt"):
            for line in path.read_text().splitlines():
                phase, name = line.split(" ", 1)
                files[phase].add(name)
    return {
        "files_to_first_gradient": len(files["gradient"]),
        "files_during_publish": len(files["publish"]),
        "gradient": sorted(files["gradient"]),
        "publish": sorted(files["publish"]),
    }


if __name__ == "__main__":
    print(json.dumps(count(sys.argv[1:])))
