"""Invalid input ends with one line that names value and fix, exit code 2, and no partial output."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import run_command
from tests.small_run import SmallRun, run_vz_ray
from vz_ray.jobs import doctor
from vz_ray.monitoring import checks
from vz_ray.utils.errors import UserError


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return SmallRun.create(tmp_path_factory.mktemp("small"))


def error_of(monkeypatch, capsys, *arguments: str) -> str:
    """Run a command that fails with exit code 2; return its one line on stderr."""
    assert run_command(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


@pytest.fixture
def train(small, monkeypatch, capsys):
    """Return a function that runs `vz-ray train` with invalid overrides and returns the error."""

    def train(*overrides: str) -> str:
        err = error_of(monkeypatch, capsys, "train", "conf/laptop.yaml", "name=bad", *small.overrides(), *overrides)
        assert not (small.runs / "bad").exists()
        return err

    return train


@pytest.fixture
def tasks(small, tmp_path):
    """Copy the training tasks and their videos."""
    folder = tmp_path / "needle"
    shutil.copytree(small.folder / "needle", folder)
    return folder / "train.json"


def first_video(tasks: Path) -> Path:
    return tasks.parent / json.loads(tasks.read_text())[0]["videos"][0]


def test_missing_video_is_named(train, tasks):
    video = first_video(tasks)
    video.unlink()
    err = train(f"data.train={tasks}")
    assert f"1 of 2 videos of {tasks} do not exist, first {video}; paths are relative to the task file" in err


@pytest.mark.parametrize("content", [b"", b"no video at all" * 100], ids=["empty", "text"])
def test_unreadable_video_is_named(train, tasks, content):
    video = first_video(tasks)
    video.write_bytes(content)
    err = train(f"data.train={tasks}")
    assert str(video) in err
    assert f"replace the video, or remove its questions from {tasks}" in err


@pytest.mark.parametrize("content", ["", "[]", "{}", "[1]", '[{"videos": []}]'])
def test_invalid_task_file_is_named(train, tasks, content):
    tasks.write_text(content)
    assert str(tasks) in train(f"data.train={tasks}")


def test_missing_task_file_is_named(train, tmp_path):
    assert f"no task file at {tmp_path / 'nowhere.json'}" in train(f"data.train={tmp_path / 'nowhere.json'}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_step=3", "unknown key train.max_step; did you mean train.max_steps?"),
        ("train.max_steps=many", "train.max_steps: Value 'many'"),
        ("train.max_steps=0", "train.max_steps is 0; it must be at least 1"),
        ("train", "override 'train': write it as section.key=value"),
        ("learner.model=elsewhere", "learner.model follows model; set that instead"),
        ("timeouts.score_s=900", "timeouts.score_s is 900; it must be at most twice turn_s (300)"),
        ("reward.function=mine", "reward.function is 'mine'; write it as package.module:name"),
        ("reward.judge.model=m", "reward.judge.base_url is ''; with model 'm' it must be"),
        ("reward.max_zoom_frames=4", "reward.max_zoom_frames follows episode.max_zoom_frames"),
    ],
)
def test_invalid_key_or_value_is_named(train, override, message):
    err = train(override)
    assert message in err
    assert f"override '{override}'" in err


def test_solution_that_is_no_option_is_named(train, tasks):
    records = json.loads(tasks.read_text())
    records[0] |= {"problem": "<image>Which?\nA. disc\nB. cross", "solution": "C"}
    records[0]["extra_info"]["answer_type"] = "multiple_choice"
    tasks.write_text(json.dumps(records))
    message = (
        f"{tasks}, question {records[0]['problem_id']!r}: the solution is 'C'; it must be one of the options A, B."
    )
    assert message in train(f"data.train={tasks}")


def test_unknown_engine_option_is_named_before_the_run_starts(train):
    assert "engine.options has foo, which vLLM" in train("rollout.engine.options.foo=1")


@pytest.fixture
def open_ended(tasks):
    """Make the first task open-ended."""
    records = json.loads(tasks.read_text())
    records[0]["extra_info"]["answer_type"] = "open_ended"
    tasks.write_text(json.dumps(records))
    return tasks


def test_open_ended_task_without_judge_is_named(train, open_ended):
    err = train(f"data.train={open_ended}")
    assert f"questions of {open_ended} need a judge" in err
    assert "Set reward.judge.model and reward.judge.base_url" in err


def test_missing_judge_key_is_named(train, open_ended, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    judge = ["model=m", "base_url=http://judge/v1", "api_key_env=NO_SUCH_KEY"]
    err = train(f"data.train={open_ended}", *(f"reward.judge.{setting}" for setting in judge))
    assert "set NO_SUCH_KEY in the environment" in err


def test_missing_judge_prompt_is_named(train, open_ended):
    judge = ["model=m", "base_url=http://judge/v1", "prompt=gone.yaml"]
    err = train(f"data.train={open_ended}", *(f"reward.judge.{setting}" for setting in judge))
    assert "gone.yaml" in err


def test_missing_reward_function_is_named(train):
    err = train("reward.function=no_such_package.rewards:mine")
    assert "reward.function 'no_such_package.rewards:mine': importing no_such_package.rewards raised" in err


def test_unknown_key_in_file_is_named_with_line(small, monkeypatch, capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: bad\ntrain:\n  group_sizes: 3\n")
    err = error_of(monkeypatch, capsys, "train", str(file), f"runs={small.runs}")
    assert f"{file}:3: unknown key train.group_sizes; did you mean train.group_size?" in err
    assert not (small.runs / "bad").exists()


@pytest.mark.parametrize(
    ("remove_part", "message"),
    [
        (lambda model: shutil.rmtree(model), "is not a directory"),
        (lambda model: (model / "model.safetensors").unlink(), "has no *.safetensors weights"),
        (lambda model: (model / "config.json").unlink(), "has no config.json"),
    ],
    ids=["absent", "no weights", "no config"],
)
def test_incomplete_model_is_named(train, small, tmp_path, remove_part, message):
    model = tmp_path / "model"
    shutil.copytree(small.folder / "base", model)
    remove_part(model)
    err = train(f"model={model}")
    assert f"model '{model}' {message}" in err


Memory = namedtuple("Memory", "available")
Usage = namedtuple("Usage", "free")


def test_low_memory_is_named(train, monkeypatch):
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: Memory(2 << 30))
    monkeypatch.setattr(doctor, "_read_cgroup_file", lambda name: "")
    assert "memory: 2.0 GiB free, 6 GiB needed; close other programs" in train()


def test_low_shared_memory_is_named(train, monkeypatch):
    disk_usage = shutil.disk_usage

    def low_shared_memory(path: str | Path) -> object:
        return Usage(100 << 20) if str(path) == "/dev/shm" else disk_usage(path)

    monkeypatch.setattr(doctor.shutil, "disk_usage", low_shared_memory)
    err = train()
    assert "shared memory: 0.1 GiB free, 0.5 GiB needed; give the container more" in err


def test_other_directory_is_not_used_as_run(small, monkeypatch, capsys, tmp_path):
    folder = tmp_path / "runs/bad"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    arguments = ["train", "conf/laptop.yaml", "name=bad", *small.overrides(), f"runs={tmp_path / 'runs'}"]
    assert "not a run directory" in error_of(monkeypatch, capsys, *arguments)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_console_shows_no_traceback(small):
    result = run_vz_ray("train", "conf/laptop.yaml", *small.overrides(), "model=nowhere")
    assert result.returncode == 2
    assert result.stderr == "vz-ray: model 'nowhere' is not a directory. Pass an HF checkpoint directory.\n"


OTHER_RAY = """
import ray, sys
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1])
task = ray.remote(lambda: "alive")
print(ray.get(task.remote()), flush=True)
sys.stdin.readline()
print(ray.get(task.remote()), flush=True)
"""


@pytest.fixture
def other_ray() -> Iterator[subprocess.Popen[str]]:
    """Start another Ray cluster on this machine, and run one task on it."""
    folder = tempfile.mkdtemp(prefix="other_")
    command = [sys.executable, "-c", OTHER_RAY, folder]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline() == "alive\n"
        yield process
    finally:
        process.kill()
        process.communicate()
        shutil.rmtree(folder, ignore_errors=True)


PRIVATE_RAY = """
import asyncio, ray, sys
from vz_ray.runtime.ray_cluster import ray_cluster
from vz_ray.config.ray import RayConfig

async def main():
    async with ray_cluster(RayConfig(num_cpus=4, object_store_mib=80)):
        print(int(ray.cluster_resources()["CPU"]))

asyncio.run(main())
"""


def test_private_cluster_ignores_other_ray_cluster(other_ray):
    environment = os.environ | {"RAY_ADDRESS": "auto"}
    result = subprocess.run(
        [sys.executable, "-c", PRIVATE_RAY], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "4\n"
    assert doctor.check_other_ray().status is checks.CheckStatus.WARNING
    assert other_ray.communicate("continue\n", timeout=60)[0] == "alive\n"


def test_missing_cluster_is_named():
    code = PRIVATE_RAY.replace("num_cpus=4, object_store_mib=80", "address='127.0.0.1:1'")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "UserError: cannot join Ray at 127.0.0.1:1: connection failed (Connection refused)" in result.stderr


def test_require_checks_names_first_failure():
    passed = checks.CheckResult("disk", checks.CheckStatus.OK, "9 GiB free")
    failed = checks.CheckResult("memory", checks.CheckStatus.FAILED, "1 GiB free", "close other programs")
    checks.require_checks(passed)
    with pytest.raises(UserError, match=r"^memory: 1 GiB free; close other programs$"):
        checks.require_checks(passed, failed)
