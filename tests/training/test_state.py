"""A run's checkpoint: all of it or none, and the next batch is the one that would have come."""

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


async def fail(directory: Path) -> None:
    """Dies half way."""
    directory.mkdir()
    (directory / "weights").write_bytes(b"w")
    raise KeyboardInterrupt


def played(iterations: int) -> TrainingState:
    """A state after so many iterations of three tasks each."""
    state = TrainingState(TaskSampler(TASKS, seed=3))
    for iteration in range(iterations):
        for task in state.tasks_for_step(iteration).next_tasks(3):
            for id in state.sample_tracker.register(iteration, task.task_id, 2):
                assert state.sample_tracker.accept(id)
        state.finish_step()
    state.weight_version = iterations + 1
    return state


async def test_the_next_batch_after_a_resume_is_the_one_that_would_have_come(run):
    state = played(4)
    loaded = TrainingState.load(await state.save(run, save_learner, keep_latest=2), TASKS)
    assert loaded == state
    assert [loaded.cursor.next_tasks(3) for _ in range(5)] == [state.cursor.next_tasks(3) for _ in range(5)]


async def test_an_interrupted_save_leaves_the_checkpoint_before_it(run):
    first = await played(1).save(run, save_learner, keep_latest=1)
    with pytest.raises(KeyboardInterrupt):
        await played(2).save(run, fail, keep_latest=1)
    assert latest_checkpoint(run) == first
    assert TrainingState.load(first, TASKS) == played(1)
    second = await played(2).save(run, save_learner, keep_latest=1)
    assert latest_checkpoint(run) == second
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000002"]


async def test_only_the_newest_are_kept(run):
    for iterations in (1, 2, 9, 10, 11):
        await played(iterations).save(run, save_learner, keep_latest=2)
    assert [path.name for path in list_checkpoints(run)] == ["step-000010", "step-000011"]


async def test_the_best_are_kept_beside_the_newest_however_old_they_are(run):
    figures = {1: 0.2, 2: 0.9, 3: None, 4: 0.5, 5: 0.9, 6: 0.1, 7: float("nan")}
    for iterations, value in figures.items():
        figure = None if value is None else ("validation/reward/accuracy", value)
        await played(iterations).save(run, save_learner, keep_latest=1, keep_best=2, metric=figure)
        assert list_checkpoints(run)[-1].name == f"step-{iterations:06d}"
    assert [path.name for path in list_checkpoints(run)] == ["step-000002", "step-000005", "step-000007"]
    assert json.loads((list_checkpoints(run)[0] / METRIC_FILE).read_text()) == {
        "metric": "validation/reward/accuracy",
        "value": 0.9,
    }


async def test_a_checkpoint_that_is_there_is_not_written_again(run):
    path = await played(2).save(run, save_learner, keep_latest=1)
    assert await played(2).save(run, fail, keep_latest=1) == path


async def test_what_killed_processes_left_of_checkpoints_is_cleared_away(run):
    for left in (".step-000001.partial", ".step-000003.retired"):
        (run.checkpoints / left / LEARNER_DIR).mkdir(parents=True)
    (run.checkpoints / "policy").mkdir()
    await played(4).save(run, save_learner, keep_latest=1)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["policy", "step-000004"]


def test_the_newest_are_kept_and_of_equally_good_ones_the_newer():
    steps = [Path(f"step-{i:06d}") for i in range(5)]
    figures = dict(zip(steps, (1.0, 3.0, 3.0, None, 2.0), strict=True))
    assert select_steps_to_keep(figures, 1, 0) == {steps[4]}
    assert select_steps_to_keep(figures, 2, 1) == {steps[2], steps[3], steps[4]}
    assert select_steps_to_keep(figures, 1, 9) == {steps[0], steps[1], steps[2], steps[4]}
    assert select_steps_to_keep({}, 1, 1) == set()


def ids(tasks):
    return [task.task_id for task in tasks]


async def test_iterations_under_way_are_played_again_with_their_tasks_and_nothing_is_skipped(run):
    state = played(2)
    now, ahead = state.tasks_for_step(2), state.tasks_for_step(3)
    first = [
        ids(now.next_tasks(2)),
        ids(ahead.next_tasks(2)),
        ids(now.next_tasks(1)),
        ids(ahead.next_tasks(1)),
    ]
    state.sample_tracker.register(2, first[0][0], 2)
    done = state.sample_tracker.register(3, first[1][0], 2)
    state.sample_tracker.accept(done[0])
    loaded = TrainingState.load(await state.save(run, save_learner, keep_latest=2), TASKS)
    assert loaded.sample_tracker.pending == ()
    for iteration, parts in ((2, (0, 2)), (3, (1, 3))):
        again = loaded.tasks_for_step(iteration)
        assert ids(again.next_tasks(3)) == [id for part in parts for id in first[part]]
        loaded.sample_tracker.register(iteration, first[parts[0]][0], 2)  # as if it had never been owed
    assert ids(loaded.tasks_for_step(4).next_tasks(1)) == ids(state.tasks_for_step(4).next_tasks(1))


async def test_a_task_that_is_gone_from_the_data_file_is_named(run):
    state = played(1)
    (gone,) = ids(state.tasks_for_step(1).next_tasks(1))
    path = await state.save(run, save_learner, keep_latest=2)
    others = [replace(task, task_id="other") if task.task_id == gone else task for task in TASKS]
    with pytest.raises(UserError, match=f"no longer contains task {gone}"):
        TrainingState.load(path, others).tasks_for_step(1)


def test_a_run_without_checkpoints_begins_afresh(run):
    assert latest_checkpoint(run) is None


@pytest.mark.parametrize("part", ["state.json", "learner"])
async def test_a_checkpoint_that_lost_a_part_is_named(run, part):
    path = await played(1).save(run, save_learner, keep_latest=1)
    (path / part).rename(run.path / "elsewhere")
    with pytest.raises(UserError, match=rf"step-000001 has no {part}: delete it"):
        latest_checkpoint(run)


async def test_another_number_of_tasks_is_refused(run):
    path = await played(1).save(run, save_learner, keep_latest=1)
    with pytest.raises(UserError, match="the data file has 6 tasks, and the run started with 7"):
        TrainingState.load(path, TASKS[:6])


def test_what_is_played_again_is_forgotten_first(run):
    validation = run.path / "validation"
    validation.mkdir()
    for iteration in range(4):
        (run.episodes / f"{iteration:06d}.jsonl").write_text("{}\n")
        (validation / f"{iteration + 1:06d}.jsonl").write_text("{}\n")
    delete_outputs_from(run, 2)
    assert sorted(path.name for path in run.episodes.iterdir()) == ["000000.jsonl", "000001.jsonl"]
    assert sorted(path.name for path in validation.iterdir()) == ["000001.jsonl", "000002.jsonl"]
