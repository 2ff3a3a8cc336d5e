"""Our own policy behind vLLM's OpenAI server plays as an expert: the same frames, the same words."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distill.conftest import RULES
from tests.rollout.hf_reference import HfReference
from tests.small_run import ROOT
from vz_ray.config.distill import TeacherConfig
from vz_ray.distill.chat_messages import TeacherPrompt
from vz_ray.distill.cost_ledger import CostLedger
from vz_ray.distill.teacher_client import TeacherClient, TeacherPolicy
from vz_ray.env.episode_runner import run_episode
from vz_ray.env.trajectory import EpisodeId, SamplingParams
from vz_ray.needle.quickstart import load_chat_format
from vz_ray.video.local_source import LocalFrameSource

MODEL = ROOT / "assets" / "tiny-base"
START_S = 240.0


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL),
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager",
        "--dtype", "float32", "--max-model-len", "2048", "--limit-mm-per-prompt", '{"image": 64}',
    ]  # fmt: skip
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **quiet})
    try:
        until = time.monotonic() + START_S
        while not _healthy(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


class RecordingPolicy:
    """A policy whose prompts and turns are kept."""

    def __init__(self, policy: TeacherPolicy) -> None:
        self.policy, self.seen = policy, []

    async def generate(self, prompt, sampling_params, *, request_id):
        action = await self.policy.generate(prompt, sampling_params, request_id=request_id)
        self.seen.append((prompt, action))
        return action


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_word_is_the_one_that_the_policy_itself_would_say(url, needle_tasks, tmp_path):
    """Greedy words over HTTP are those of a plain forward on the wire format's tokens and the same frames."""
    wire = load_chat_format(MODEL, RULES)
    config = TeacherConfig(model="tiny", base_url=url, image_format="png", temperature=0.0)
    seen = []

    async def go(frames: LocalFrameSource) -> None:
        expert = TeacherClient(config, CostLedger(Path(tmp_path / "replies.jsonl")))
        for task in needle_tasks[:6]:
            policy = RecordingPolicy(TeacherPolicy(expert, wire, TeacherPrompt()))
            id, sampling = EpisodeId(0, task.task_id, 0), SamplingParams(0.0, max_tokens=64)
            await run_episode(task, policy, frames, wire, RULES, episode_id=id, sampling_params=sampling)
            seen.extend(policy.seen)
        await expert.close()

    with LocalFrameSource() as frames:
        asyncio.run(go(frames))
    reference = HfReference(MODEL, ())
    assert len(seen) >= 6
    for prompt, action in seen:
        logits = reference.logits(prompt, action.token_ids)[:-1]
        assert logits.argmax(dim=-1).tolist() == list(action.token_ids), action.text
