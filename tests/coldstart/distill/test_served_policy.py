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

from tests.coldstart.distill.conftest import RULES
from tests.rollout.reference import Reference
from tests.small_run import ROOT
from vz_ray.coldstart.distill.account import Account
from vz_ray.coldstart.distill.chat import Guide
from vz_ray.coldstart.distill.expert import Expert, ExpertPolicy
from vz_ray.config.distill import ExpertConfig
from vz_ray.episode.runner import play
from vz_ray.episode.trajectory import EpisodeId, Sampling
from vz_ray.quickstart import wire_of
from vz_ray.video.local import LocalFrames

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


class Noted:
    """A policy whose prompts and turns are kept."""

    def __init__(self, policy: ExpertPolicy) -> None:
        self.policy, self.seen = policy, []

    async def act(self, prompt, sampling, *, request):
        action = await self.policy.act(prompt, sampling, request=request)
        self.seen.append((prompt, action))
        return action


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_word_is_the_one_that_the_policy_itself_would_say(url, needle_tasks, tmp_path):
    """Greedy words over HTTP are those of a plain forward on the wire format's tokens and the same frames."""
    wire = wire_of(MODEL, RULES)
    config = ExpertConfig(model="tiny", base_url=url, image="png", temperature=0.0)
    seen = []

    async def go(frames: LocalFrames) -> None:
        expert = Expert(config, Account(Path(tmp_path / "replies.jsonl")))
        for task in needle_tasks[:6]:
            policy = Noted(ExpertPolicy(expert, wire, Guide()))
            id, sampling = EpisodeId(0, task.task_id, 0), Sampling(0.0, max_tokens=64)
            await play(task, policy, frames, wire, RULES, id=id, sampling=sampling)
            seen.extend(policy.seen)
        await expert.close()

    with LocalFrames() as frames:
        asyncio.run(go(frames))
    reference = Reference(MODEL, ())
    assert len(seen) >= 6
    for prompt, action in seen:
        logits = reference.logits(prompt, action.token_ids)[:-1]
        assert logits.argmax(dim=-1).tolist() == list(action.token_ids), action.text
