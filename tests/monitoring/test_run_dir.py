"""Run directory: creation, resume, lock and configuration changes."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from vz_ray.monitoring.run_dir import RunDir
from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.errors import UserError


def test_new_run_has_folders_and_config(tmp_path):
    run, resumed = RunDir.create_or_resume(tmp_path / "runs" / "a", "seed: 1\n")
    assert not resumed
    assert run.config.read_text() == "seed: 1\n"
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "config.yaml", "episodes", "logs"]


def test_same_config_resumes(tmp_path):
    RunDir.create_or_resume(tmp_path / "a", "seed: 1\n")
    run, resumed = RunDir.create_or_resume(tmp_path / "a", "seed: 1\n")
    assert resumed
    assert RunDir.open(tmp_path / "a") == run


def test_config_with_other_key_order_resumes(tmp_path):
    run, _ = RunDir.create_or_resume(tmp_path / "a", "seed: 1\ndata:\n  train: x\n  shots:\n  - 4\n  - 8\n")
    reordered = "data:\n  shots:\n  - 4\n  - 8\n  train: x\nseed: 1\n"
    assert RunDir.create_or_resume(tmp_path / "a", reordered)[1]
    run.metrics.write_text("")
    with pytest.raises(UserError, match=r"stored: 'data.shots: \[4, 8\]', now: 'data.shots: \[8, 4\]'"):
        RunDir.create_or_resume(tmp_path / "a", reordered.replace("- 4\n  - 8", "- 8\n  - 4"))


@pytest.mark.parametrize(
    ("config_yaml", "difference"),
    [
        ("seed: 2\nlr: 1\n", "stored: 'seed: 1', now: 'seed: 2'"),
        ("seed: 1\n", "stored: 'lr: 1', now: 'lr' is not set"),
        ("seed: 1\nlr: 1\nx: 1\n", "stored: 'x' is not set, now: 'x: 1'"),
    ],
)
def test_different_config_is_rejected_with_the_difference(tmp_path, config_yaml, difference):
    run, _ = RunDir.create_or_resume(tmp_path / "a", "seed: 1\nlr: 1\n")
    run.metrics.write_text("")
    with pytest.raises(UserError, match=difference):
        RunDir.create_or_resume(tmp_path / "a", config_yaml)
    assert RunDir.open(tmp_path / "a").config.read_text() == "seed: 1\nlr: 1\n"


def test_other_directory_is_rejected_unchanged(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not a run directory"):
        RunDir.create_or_resume(tmp_path, "")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_run_killed_during_creation_resumes(tmp_path):
    run = tmp_path / "r"
    (run / "episodes").mkdir(parents=True)
    (run / "logs").mkdir()
    (run / ".config.yaml.123.tmp").write_text("a: ")
    assert RunDir.create_or_resume(run, "a: 1\n") == (RunDir(run), False)
    assert (run / "config.yaml").read_text() == "a: 1\n"
    (run / "config.yaml").unlink()
    (run / "episodes/000000.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="not a run directory"):
        RunDir.create_or_resume(run, "a: 1\n")


def test_file_in_the_path_is_rejected(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(UserError, match=r"cannot use .*/a/b as run directory: Not a directory"):
        RunDir.create_or_resume(tmp_path / "a" / "b", "")


def test_opening_a_missing_run_fails(tmp_path):
    with pytest.raises(UserError, match="no run at"):
        RunDir.open(tmp_path / "a")


def try_to_lock(path: Path, answers) -> None:
    try:
        with RunDir.open(path).lock():
            answers.put("locked")
    except UserError as error:
        answers.put(str(error))


def test_file_system_without_locks_is_named(tmp_path, monkeypatch):
    run, _ = RunDir.create_or_resume(tmp_path / "run", "a: 1\n")

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(UserError, match=r"has no file locks \(No locks available\).* option flock"), run.lock():
        pass


def test_only_one_process_holds_the_run_lock(tmp_path):
    run, _ = RunDir.create_or_resume(tmp_path / "a", "")
    answers = multiprocessing.get_context("spawn").Queue()

    def lock_in_child() -> str:
        other = multiprocessing.get_context("spawn").Process(target=try_to_lock, args=(run.path, answers))
        other.start()
        answer = answers.get(timeout=60)
        other.join(60)
        return answer

    with run.lock():
        assert f"is in use by process {os.getpid()}" in lock_in_child()
    assert lock_in_child() == "locked"


def test_failed_atomic_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    write_atomic(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"new")]


def test_resume_may_change_mutable_keys_only(tmp_path):
    original = "seed: 1\nlearner:\n  world_size: 2\n  seed: 3\nranks: 5\n"
    run, _ = RunDir.create_or_resume(tmp_path / "a", original, ["learner.world_size"])
    changed = original.replace("world_size: 2", "world_size: 4")
    assert RunDir.create_or_resume(tmp_path / "a", changed, ["learner.world_size"]) == (run, True)
    assert run.config.read_text() == original
    run.update_config(changed)
    run.metrics.write_text("")
    assert run.config.read_text() == changed
    for other, match in (
        ("seed: 3", "stored: 'learner.seed: 3', now: 'learner.seed: 9'"),
        ("ranks: 5", "stored: 'ranks: 5'"),
    ):
        with pytest.raises(UserError, match=match):
            RunDir.create_or_resume(tmp_path / "a", changed.replace(other, f"{other[:-1]}9"), ["learner.world_size"])


def test_run_without_results_accepts_another_config(tmp_path):
    refused = "rollout:\n  engine:\n    options:\n      foo: 1\n"
    run, _ = RunDir.create_or_resume(tmp_path / "a", refused)
    with run.lock():
        (run.logs / "vz_ray.log").write_text("refused")
    corrected = "rollout:\n  engine:\n    options: {}\n"
    assert RunDir.create_or_resume(tmp_path / "a", corrected) == (run, True)
    assert run.config.read_text() == corrected
    (run.checkpoints / "step-000001").mkdir()
    with pytest.raises(UserError, match=r"stored: 'rollout.engine.options.foo' is not set, now: '"):
        RunDir.create_or_resume(tmp_path / "a", refused)


def test_running_run_with_another_config_is_reported_as_in_use(tmp_path):
    run, _ = RunDir.create_or_resume(tmp_path / "a", "seed: 1\n")
    run.metrics.write_text("")
    with run.lock(), pytest.raises(UserError) as caught:
        RunDir.create_or_resume(tmp_path / "a", "seed: 2\n")
    assert str(caught.value) == f"{run.path} is in use by process {os.getpid()}; wait for that run or stop it"
    assert run.config.read_text() == "seed: 1\n"
