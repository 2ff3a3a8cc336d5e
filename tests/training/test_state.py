"""Checkpoints of a run are atomic, and a resumed run continues with the same batches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vz_ray.data.task_sampler import TaskSampler
from vz_ray.env.task import AnswerType, Task
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.training.state import (
    LEARNER_DIR,
    TrainingState,
    delete_outputs_from,
    latest_checkpoint,
    list_checkpoints,
)
from vz_ray.utils.errors import UserError
from vz_ray.utils.step_dirs import METRIC_FILE, select_steps_to_keep

TASKS = [Task(f"t{i}", f"v{i}.mp4", "what?", "A", AnswerType.MULTIPLE_CHOICE) for i in range(7)]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create_or_resume(tmp_path / "run", "name: run\n")[0]


async def save_learner(directory: Path) -> None:
    directory.mkdir()
    (directory / "weights").write_bytes(b"w" * 100)


async def save_part_and_fail(directory: Path) -> None:
    directory.mkdir()
    (directory / "weights").write_bytes(b"w")
    raise KeyboardInterrupt


def state_after(steps: int) -> TrainingState:
    """Return the state after `steps` steps of three tasks."""
    state = TrainingState(TaskSampler(TASKS, seed=3))
    for step in range(steps):
        for task in state.tasks_for_step(step).next_tasks(3):
            for id in state.sample_tracker.register(step, task.task_id, 2):
                assert state.sample_tracker.accept(id)
        state.finish_step()
    state.weight_version = steps + 1
    return state


async def test_resumed_run_yields_the_same_batches(run):
    state = state_after(4)
    loaded = TrainingState.load(await state.save(run, save_learner, keep_latest=2), TASKS)
    assert loaded == state
    assert [loaded.task_sampler.next_tasks(3) for _ in range(5)] == [state.task_sampler.next_tasks(3) for _ in range(5)]


async def test_interrupted_save_keeps_previous_checkpoint(run):
    first = await state_after(1).save(run, save_learner, keep_latest=1)
    with pytest.raises(KeyboardInterrupt):
        await state_after(2).save(run, save_part_and_fail, keep_latest=1)
    assert latest_checkpoint(run) == first
    assert TrainingState.load(first, TASKS) == state_after(1)
    second = await state_after(2).save(run, save_learner, keep_latest=1)
    assert latest_checkpoint(run) == second
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000002"]


async def test_newest_checkpoints_are_kept(run):
    for steps in (1, 2, 9, 10, 11):
        await state_after(steps).save(run, save_learner, keep_latest=2)
    assert [path.name for path in list_checkpoints(run)] == ["step-000010", "step-000011"]


async def test_best_checkpoints_are_kept_besides_newest(run):
    values = {1: 0.2, 2: 0.9, 3: None, 4: 0.5, 5: 0.9, 6: 0.1, 7: float("nan")}
    for steps, value in values.items():
        metric = None if value is None else ("validation/reward/accuracy", value)
        await state_after(steps).save(run, save_learner, keep_latest=1, keep_best=2, metric=metric)
        assert list_checkpoints(run)[-1].name == f"step-{steps:06d}"
    assert [path.name for path in list_checkpoints(run)] == ["step-000002", "step-000005", "step-000007"]
    assert json.loads((list_checkpoints(run)[0] / METRIC_FILE).read_text()) == {
        "metric": "validation/reward/accuracy",
        "value": 0.9,
    }


async def test_existing_checkpoint_is_not_written_again(run):
    path = await state_after(2).save(run, save_learner, keep_latest=1)
    assert await state_after(2).save(run, save_part_and_fail, keep_latest=1) == path


async def test_save_removes_leftovers_of_killed_processes(run):
    for leftover in (".step-000001.partial", ".step-000003.retired"):
        (run.checkpoints / leftover / LEARNER_DIR).mkdir(parents=True)
    (run.checkpoints / "policy").mkdir()
    await state_after(4).save(run, save_learner, keep_latest=1)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["policy", "step-000004"]


def test_newer_checkpoint_wins_a_tie():
    steps = [Path(f"step-{i:06d}") for i in range(5)]
    metrics = dict(zip(steps, (1.0, 3.0, 3.0, None, 2.0), strict=True))
    assert select_steps_to_keep(metrics, 1, 0) == {steps[4]}
    assert select_steps_to_keep(metrics, 2, 1) == {steps[2], steps[3], steps[4]}
    assert select_steps_to_keep(metrics, 1, 9) == {steps[0], steps[1], steps[2], steps[4]}
    assert select_steps_to_keep({}, 1, 1) == set()


def task_ids(tasks):
    return [task.task_id for task in tasks]


async def test_unfinished_steps_restart_with_their_tasks(run):
    state = state_after(2)
    current, prefetched = state.tasks_for_step(2), state.tasks_for_step(3)
    taken = [
        task_ids(current.next_tasks(2)),
        task_ids(prefetched.next_tasks(2)),
        task_ids(current.next_tasks(1)),
        task_ids(prefetched.next_tasks(1)),
    ]
    state.sample_tracker.register(2, taken[0][0], 2)
    samples = state.sample_tracker.register(3, taken[1][0], 2)
    state.sample_tracker.accept(samples[0])
    loaded = TrainingState.load(await state.save(run, save_learner, keep_latest=2), TASKS)
    assert loaded.sample_tracker.pending == ()
    for step, parts in ((2, (0, 2)), (3, (1, 3))):
        tasks = loaded.tasks_for_step(step)
        assert task_ids(tasks.next_tasks(3)) == [task_id for part in parts for task_id in taken[part]]
        loaded.sample_tracker.register(step, taken[parts[0]][0], 2)  # the step is registered again
    assert task_ids(loaded.tasks_for_step(4).next_tasks(1)) == task_ids(state.tasks_for_step(4).next_tasks(1))


async def test_task_missing_in_data_file_is_named(run):
    state = state_after(1)
    (missing,) = task_ids(state.tasks_for_step(1).next_tasks(1))
    path = await state.save(run, save_learner, keep_latest=2)
    other_tasks = [replace(task, task_id="other") if task.task_id == missing else task for task in TASKS]
    with pytest.raises(UserError, match=f"no longer contains task {missing}"):
        TrainingState.load(path, other_tasks).tasks_for_step(1)


def test_run_without_checkpoint_has_no_latest(run):
    assert latest_checkpoint(run) is None


@pytest.mark.parametrize("part", ["state.json", "learner"])
async def test_missing_part_of_checkpoint_is_named(run, part):
    path = await state_after(1).save(run, save_learner, keep_latest=1)
    (path / part).rename(run.path / "elsewhere")
    with pytest.raises(UserError, match=rf"step-000001 has no {part}: delete it"):
        latest_checkpoint(run)


async def test_other_number_of_tasks_is_rejected(run):
    path = await state_after(1).save(run, save_learner, keep_latest=1)
    with pytest.raises(UserError, match="the data file has 6 tasks, and the run started with 7"):
        TrainingState.load(path, TASKS[:6])


def test_outputs_of_repeated_steps_are_deleted(run):
    validation = run.path / "validation"
    validation.mkdir()
    for step in range(4):
        (run.episodes / f"{step:06d}.jsonl").write_text("{}\n")
        (validation / f"{step + 1:06d}.jsonl").write_text("{}\n")
    delete_outputs_from(run, 2)
    assert sorted(path.name for path in run.episodes.iterdir()) == ["000000.jsonl", "000001.jsonl"]
    assert sorted(path.name for path in validation.iterdir()) == ["000001.jsonl", "000002.jsonl"]
