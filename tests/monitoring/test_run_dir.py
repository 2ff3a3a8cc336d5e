from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from vz_ray.monitoring import RunDir, UserError, write_atomic


def test_a_new_run_has_its_folders_and_config(tmp_path):
    run, resumed = RunDir.create_or_resume(tmp_path / "runs" / "a", "seed: 1\n")
    assert not resumed
    assert run.config.read_text() == "seed: 1\n"
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "config.yaml", "episodes", "logs"]


def test_the_same_config_goes_on(tmp_path):
    RunDir.create_or_resume(tmp_path / "a", "seed: 1\n")
    run, resumed = RunDir.create_or_resume(tmp_path / "a", "seed: 1\n")
    assert resumed
    assert RunDir.open(tmp_path / "a") == run


@pytest.mark.parametrize(
    ("now", "difference"),
    [
        ("seed: 2\nlr: 1\n", "'seed: 1' there, 'seed: 2' now"),
        ("seed: 1\n", "'lr: 1' there, '' now"),
        ("seed: 1\nlr: 1\nx: 1\n", "'' there, 'x: 1' now"),
    ],
)
def test_another_config_is_refused_and_the_difference_named(tmp_path, now, difference):
    RunDir.create_or_resume(tmp_path / "a", "seed: 1\nlr: 1\n")
    with pytest.raises(UserError, match=difference):
        RunDir.create_or_resume(tmp_path / "a", now)
    assert RunDir.open(tmp_path / "a").config.read_text() == "seed: 1\nlr: 1\n"


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not a run directory"):
        RunDir.create_or_resume(tmp_path, "")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_killed_while_it_was_made_goes_on(tmp_path):
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


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(UserError, match=r"cannot use .*/a/b as run directory: Not a directory"):
        RunDir.create_or_resume(tmp_path / "a" / "b", "")


def test_opening_a_run_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no run at"):
        RunDir.open(tmp_path / "a")


def try_to_hold(path: Path, answers) -> None:
    try:
        with RunDir.open(path).lock():
            answers.put("held")
    except UserError as error:
        answers.put(str(error))


def test_one_process_at_a_time_holds_a_run(tmp_path):
    run, _ = RunDir.create_or_resume(tmp_path / "a", "")
    answers = multiprocessing.get_context("spawn").Queue()

    def ask() -> str:
        other = multiprocessing.get_context("spawn").Process(target=try_to_hold, args=(run.path, answers))
        other.start()
        answer = answers.get(timeout=60)
        other.join(60)
        return answer

    with run.lock():
        assert f"is being written by process {os.getpid()}" in ask()
    assert ask() == "held"


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    write_atomic(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"new")]


def test_a_run_goes_on_with_other_values_of_keys_that_are_free_and_of_no_others(tmp_path):
    before = "seed: 1\nlearner:\n  ranks: 2\n  seed: 3\nranks: 5\n"
    run, _ = RunDir.create_or_resume(tmp_path / "a", before, ["learner.world_size"])
    now = before.replace("ranks: 2", "ranks: 4")
    assert RunDir.create_or_resume(tmp_path / "a", now, ["learner.world_size"]) == (run, True)
    assert run.config.read_text() == before
    run.update_config(now)
    assert run.config.read_text() == now
    for other, match in (("seed: 3", "'seed: 3' there, 'seed: 9' now"), ("ranks: 5", "'ranks: 5' there")):
        with pytest.raises(UserError, match=match):
            RunDir.create_or_resume(
                tmp_path / "a", now.replace(other, f"{other[:-1]}9"), ["learner.world_size"]
            )
