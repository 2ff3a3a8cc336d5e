"""The Python API: configs, agents, runs and checkpoints."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import vz_ray
from tests.distill.oracle_server import OracleServer
from tests.learner.rank_worker import small_config, small_training_data
from tests.learner.training_data import small_model
from tests.needle.tiny_setup import make_train_tasks
from tests.rewards.fake_endpoint import serve_endpoint
from vz_ray.config.distill import TeacherConfig
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.rollout import EngineConfig
from vz_ray.data.chat_format_loader import load_chat_format
from vz_ray.data.episode_record import EpisodeRecord, append_records
from vz_ray.env.events import ZoomRequested
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeStatus
from vz_ray.learner.trainer import Trainer
from vz_ray.utils.errors import UserError

MODEL = Path(__file__).resolve().parent.parent / "assets/tiny-base"


@pytest.fixture(scope="module")
def episode() -> EpisodeConfig:
    return vz_ray.load_config("conf/quickstart.yaml", command="quickstart").episode


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Task]:
    tasks = make_train_tasks(tmp_path_factory.mktemp("needle"), 1, [4])
    return [replace(task, question=f"({task.task_id}) {task.question}") for task in tasks]


@pytest.fixture(scope="module")
def agent(episode: EpisodeConfig) -> Iterator[vz_ray.VideoAgent]:
    engine = EngineConfig(kv_cache_gib=0.25, mm_processor_cache_gib=0.1, num_threads=1)
    with vz_ray.VideoAgent.from_checkpoint(MODEL, episode, engine) as agent:
        yield agent


def test_import_loads_no_heavy_package():
    code = "import sys, vz_ray; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not set(done.stdout.split()) & {"ray", "vllm", "transformers"}


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'fly'"):
        vz_ray.fly  # noqa: B018


def test_load_config_applies_overrides():
    assert vz_ray.load_config("conf/quickstart.yaml", ["train.max_steps=3"], "quickstart").train.max_steps == 3


def test_load_config_names_valid_commands():
    with pytest.raises(UserError, match="command is 'fly'; it must be one of train, sft, eval"):
        vz_ray.load_config(command="fly")


def test_endpoint_agent_runs_a_whole_episode(tasks: list[Task], episode: EpisodeConfig):
    (task, *_) = tasks
    zooms = []
    with serve_endpoint(OracleServer(tasks, load_chat_format(MODEL, episode))) as endpoint:
        config = TeacherConfig(model="oracle", base_url=endpoint.url)
        with vz_ray.VideoAgent.from_endpoint(config, MODEL, episode) as agent:
            trajectory = agent.run(
                task.video,
                task.question,
                on_event=lambda event: zooms.append(event) if isinstance(event, ZoomRequested) else None,
            )
    assert trajectory.answer == task.answer
    assert trajectory.status is EpisodeStatus.ANSWERED
    assert len(zooms) == len(trajectory.zooms) >= 1


def test_missing_and_unreadable_videos_are_named(episode: EpisodeConfig, tmp_path: Path):
    config = TeacherConfig(model="oracle", base_url="http://127.0.0.1:9/v1")
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    with vz_ray.VideoAgent.from_endpoint(config, MODEL, episode) as agent:
        with pytest.raises(UserError, match=r"gone\.mp4 does not exist"):
            agent.run([text, tmp_path / "gone.mp4"], "What flashes?")
        trajectory = agent.run(text, "What flashes?")
    assert trajectory.status is EpisodeStatus.FAILED
    assert str(text) in trajectory.error


def test_engine_agent_samples_turns_with_logprobs(agent: vz_ray.VideoAgent, tasks: list[Task]):
    trajectory = agent.run(tasks[0].video, tasks[0].question)
    assert trajectory.sampled_logprobs
    again = agent.run(tasks[0].video, tasks[0].question)
    assert again.expanded_ids == trajectory.expanded_ids


def test_checkpoint_agent_refuses_other_directories(tmp_path: Path):
    with pytest.raises(UserError, match=r"is not a checkpoint directory: it has no config\.json"):
        vz_ray.VideoAgent.from_checkpoint(tmp_path)


def test_episodes_are_read_as_records_and_flat_rows(agent: vz_ray.VideoAgent, tasks: list[Task], tmp_path: Path):
    trajectory = agent.run(tasks[0].video, tasks[0].question)
    (tmp_path / "episodes").mkdir()
    append_records(tmp_path / "episodes/000000.jsonl", [EpisodeRecord(tasks[0], trajectory, "rl", 0, 0.5)])
    (record,) = vz_ray.read_episodes(tmp_path)
    assert record.trajectory == trajectory
    (row,) = vz_ray.episode_rows(tmp_path)
    assert row["task"] == tasks[0].task_id
    assert row["frames"] == len(trajectory.frame_refs)
    assert row["advantage"] == 0.5
    assert row["reward"] is None


def test_missing_episode_folder_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="eval does not exist"):
        list(vz_ray.read_episodes(tmp_path, "eval"))


def test_metrics_keep_non_finite_values(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 2.0, "learner/loss": "nan"}\n')
    (row,) = vz_ray.read_metrics(tmp_path)
    assert row["step"] == 1
    assert row["learner/loss"] != row["learner/loss"]


def test_metrics_of_missing_run_are_an_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"nope/metrics\.jsonl does not exist"):
        vz_ray.read_metrics(tmp_path / "nope")


def test_load_checkpoint_returns_trained_tensors(tmp_path: Path):
    data = small_training_data(small_model(tmp_path / "model"))
    trainer = Trainer(small_config(data.model, 0))
    trainer.sft_step(data.trajectories[:2], data.pixels)
    trainer.save_checkpoint(tmp_path / "run/checkpoints/step-000003/learner")
    checkpoint = vz_ray.load_checkpoint(tmp_path / "run")
    assert checkpoint.step == 3
    name, shape = next(iter(checkpoint.shapes.items()))
    assert tuple(checkpoint.tensor(name).shape) == shape
    with pytest.raises(KeyError):
        checkpoint.tensor("no.such.tensor")


def test_load_checkpoint_names_a_run_without_one(tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has no checkpoint yet"):
        vz_ray.load_checkpoint(tmp_path)
