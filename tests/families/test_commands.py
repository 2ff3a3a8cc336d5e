"""Every command with the tiny model of each other family: distill, sft, train, eval, and serve with OpenAI's client."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.distill.oracle_server import OracleServer
from tests.needle.tiny_setup import EPISODE_CONFIG
from tests.rewards.fake_endpoint import serve_endpoint
from tests.small_run import run_vz_ray
from vz_ray.config.data import SynthConfig
from vz_ray.data.chat_format_loader import load_chat_format
from vz_ray.data.task_file import read_tasks
from vz_ray.families import FAMILIES
from vz_ray.needle.base_training import make_tokenizer_corpus
from vz_ray.needle.synthesis import synthesize
from vz_ray.needle.tiny_families import find_tiny_family
from vz_ray.needle.tiny_model import build_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

START_S = 400.0


@dataclass(frozen=True)
class FamilyRun:
    """Videos, tasks and a random tiny model of a family."""

    family: str
    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def tasks(self) -> Path:
        return self.folder / "needle" / "train.json"

    @property
    def frame_area(self) -> int:
        """Area of a frame of one visual token in pixels."""
        return find_tiny_family(self.family).frame_side ** 2

    @property
    def engine_dtype(self) -> str:
        return find_tiny_family(self.family).engine_dtype

    @property
    def episode(self) -> list[str]:
        return [f"episode.min_pixels={self.frame_area}", f"episode.max_pixels={self.frame_area}"]

    def command(self, *arguments: str) -> str:
        """Run a command to its end and return its output."""
        done = run_vz_ray(*arguments, f"runs={self.folder / 'runs'}", *self.episode, timeout_s=900)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name


@pytest.fixture(scope="module", params=[family for family in FAMILIES if family != "qwen2_5_vl"])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FamilyRun:
    setup = FamilyRun(request.param, tmp_path_factory.mktemp(request.param))
    build_tiny_model(setup.base, make_tokenizer_corpus(), family=setup.family)
    config = SynthConfig(
        directory=str(setup.folder / "needle"), side=128, train=2, sft=0, validation=0, test=0, shot_s=[4], workers=1
    )
    synthesize(config)
    records = json.loads(setup.tasks.read_text())
    for record in records:
        # The oracle server selects the oracle by the task id in the question.
        record["problem"] = f"<image>({record['problem_id']}) " + record["problem"].removeprefix("<image>")
    setup.tasks.write_text(json.dumps(records))
    return setup


@pytest.fixture(scope="module")
def dataset(setup: FamilyRun) -> Path:
    """A distilled data set."""
    episode = replace(EPISODE_CONFIG, min_pixels=setup.frame_area, max_pixels=setup.frame_area)
    chat_format = load_chat_format(setup.base, episode)
    with serve_endpoint(OracleServer(read_tasks(setup.tasks), chat_format)) as endpoint:
        setup.command(
            "distill", "exemplar", "conf/distill/needle.yaml", "name=distilled", f"model={setup.base}",
            f"tasks={setup.tasks}", "teacher.model=oracle", f"teacher.base_url={endpoint.url}",
            "attempts_per_task=1",
        )  # fmt: skip
    card = json.loads((setup.run("distilled") / "dataset" / "card.json").read_text())
    assert card["kept"] == len(read_tasks(setup.tasks))
    return setup.run("distilled") / "dataset" / "sft.json"


@pytest.fixture(scope="module")
def policy(setup: FamilyRun, dataset: Path) -> Path:
    """A checkpoint trained on the data set."""
    setup.command(
        "sft", "name=tuned", f"model={setup.base}", f"data={dataset}", "episode.prompt=conf/prompt/tiny.yaml",
        "episode.max_context=2048", "learner.zero_stage=0", "learner.loss.kl_coef=0", "clips.num_actors=1",
        "clips.disk_cache_gib=0", "sft.max_steps=2", "sft.batch_size=2",
    )  # fmt: skip
    return setup.run("tuned") / "models" / "policy"


def test_rl_trains_the_tuned_policy(setup: FamilyRun, policy: Path) -> None:
    setup.command(
        "train", "conf/laptop.yaml", "name=rl", f"model={policy}", f"data.train={setup.tasks}",
        f"data.validation={setup.tasks}", "learner.loss.min_reward_std=0", "learner.cpus_per_rank=1",
        "train.batch_size=2", "train.max_sampled_tasks=2", "train.group_size=2", "train.max_steps=2",
        "episode.max_turn_tokens=24", "rollout.engine.kv_cache_gib=0.25",
        f"rollout.engine.dtype={setup.engine_dtype}",
    )  # fmt: skip
    rows = [json.loads(line) for line in (setup.run("rl") / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    limit = 1e-3 if setup.engine_dtype == "float32" else 0.5
    assert all(0 < row["mismatch/logprob_abs_max"] < limit for row in rows)


def test_eval_answers_every_question(setup: FamilyRun, policy: Path) -> None:
    output = setup.command(
        "eval", "conf/eval/needle.yaml", "name=exam", f"model={policy}", f"data={setup.folder}",
        "benchmarks.needle.annotations=needle/train.json", "episode.max_turn_tokens=24",
        "rollout.engine.kv_cache_gib=0.25", "eval.bootstrap_resamples=100",
        f"rollout.engine.dtype={setup.engine_dtype}",
    )  # fmt: skip
    assert "accuracy" in output
    report = json.loads((setup.run("exam") / "benchmarks.json").read_text())
    assert report["benchmarks"]["needle"]["questions_evaluated"] == len(read_tasks(setup.tasks))


@contextmanager
def server(setup: FamilyRun, policy: Path) -> Iterator[str]:
    """Start `vz-ray serve` and stop it with Ctrl-C."""
    command = [
        sys.executable, "-m", "vz_ray.cli", "serve", "conf/serve/tiny.yaml", "port=0", f"model={policy}",
        f"log_dir={setup.folder}/logs", f"files.directory={setup.folder}/uploads",
        f"files.allowed_dirs=[{setup.folder}]", "clips.disk_cache_gib=0", "engine.kv_cache_gib=0.25",
        f"engine.dtype={setup.engine_dtype}", *setup.episode,
    ]  # fmt: skip
    output = setup.folder / "serve.txt"
    with output.open("w") as out:
        process = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        end_time = time.monotonic() + START_S
        while "is serving at" not in (message := output.read_text()):
            assert process.poll() is None, message
            assert time.monotonic() < end_time, message
            time.sleep(0.5)
        yield next(word for word in message.split() if word.startswith("http://"))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def test_served_agent_answers_openai_client(setup: FamilyRun, policy: Path) -> None:
    video = str(read_tasks(setup.tasks)[0].video)
    with server(setup, policy) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        content = [{"type": "video_url", "video_url": {"url": video}}, {"type": "text", "text": "What flashes?"}]
        messages: Any = [{"role": "user", "content": content}]
        completion = client.chat.completions.create(model="zoomer", messages=messages)
    assert completion.usage is not None
    assert completion.usage.frames > 0  # type: ignore[attr-defined]
    assert completion.usage.completion_tokens > 0
