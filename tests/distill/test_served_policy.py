"""The policy behind vLLM's OpenAI server as a teacher: same frames, same tokens."""

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

from tests.needle.tiny_setup import EPISODE_CONFIG
from tests.rollout.hf_reference import HfReference
from tests.small_run import ROOT
from vz_ray.config.distill import TeacherConfig
from vz_ray.data.chat_format_loader import load_chat_format
from vz_ray.distill.chat_messages import TeacherPrompt
from vz_ray.distill.cost_ledger import CostLedger
from vz_ray.distill.teacher_client import TeacherClient, TeacherPolicy
from vz_ray.env.episode_runner import run_episode
from vz_ray.env.trajectory import EpisodeId, SamplingParams
from vz_ray.video.local_source import LocalFrameSource

MODEL = ROOT / "assets" / "tiny-base"
START_TIMEOUT_S = 240.0


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL),
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager",
        "--dtype", "float32", "--max-model-len", "2048", "--limit-mm-per-prompt", '{"image": 64}',
    ]  # fmt: skip
    env = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **env})
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _healthy(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
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
    """Policy that records its prompts and turns."""

    def __init__(self, policy: TeacherPolicy) -> None:
        self.policy, self.calls = policy, []

    async def generate(self, prompt, sampling_params, *, request_id):
        action = await self.policy.generate(prompt, sampling_params, request_id=request_id)
        self.calls.append((prompt, action))
        return action


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_served_policy_generates_same_tokens(url, needle_tasks, tmp_path):
    """Compare greedy turns over HTTP with a forward pass on the chat format's tokens and the same frames."""
    chat_format = load_chat_format(MODEL, EPISODE_CONFIG)
    config = TeacherConfig(model="tiny", base_url=url, image_format="png", temperature=0.0)
    calls = []

    async def run(frames: LocalFrameSource) -> None:
        teacher = TeacherClient(config, CostLedger(Path(tmp_path / "replies.jsonl")))
        for task in needle_tasks[:6]:
            policy = RecordingPolicy(TeacherPolicy(teacher, chat_format, TeacherPrompt()))
            await run_episode(
                task,
                policy,
                frames,
                chat_format,
                EPISODE_CONFIG,
                episode_id=EpisodeId(0, task.task_id, 0),
                sampling_params=SamplingParams(0.0, max_tokens=64),
            )
            calls.extend(policy.calls)
        await teacher.close()

    with LocalFrameSource() as frames:
        asyncio.run(run(frames))
    reference = HfReference(MODEL, ())
    assert len(calls) >= 6
    for prompt, action in calls:
        logits = reference.logits(prompt, action.token_ids)[:-1]
        assert logits.argmax(dim=-1).tolist() == list(action.token_ids), action.text
