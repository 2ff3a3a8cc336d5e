"""The gate with a real engine: its drafts tell what sampling would, and their tokens are kept as sampled."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from tests.rollout.reference import Reference, frame, tiny
from tests.video.making import Made, make
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.gate import GateConfig
from vz_ray.config.rollout import EngineConfig
from vz_ray.data.task import Task
from vz_ray.episode.gate import forced_ids, option_entropy
from vz_ray.episode.runner import play
from vz_ray.episode.trajectory import EpisodeId, Sampling, Status, Trajectory, Written
from vz_ray.episode.wire import WireFormat, Wording
from vz_ray.rollout.engine import Engine
from vz_ray.video.local import LocalFrames

pytestmark = pytest.mark.asyncio(loop_scope="module")

ASK = "<|im_start|>user\n<image><image>what flashes? A. disc B. ring<|im_end|>\n<|im_start|>assistant\n"
TASK = Task("t", "", "What flashes? A. disc B. ring C. cross", "B")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("draft") / "model")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model: Path, engine_config: EngineConfig) -> AsyncIterator[Engine]:
    engine = await Engine.start(model, engine_config, name="engine", log=model.parent / "engine.log")
    yield engine
    await engine.shutdown()


async def test_a_draft_tells_what_sampling_would_have_told(engine: Engine, model: Path) -> None:
    reference = Reference(model, engine.banned)
    prompt = reference.prompt(ASK, [frame(0, 56, 56), frame(1, 28, 56)])
    wire = WireFormat(reference.tokenizer, Wording.load("conf/prompt/tiny.yaml"))
    forced, options = forced_ids(wire, "<think></think><answer>", ("A", "B", "C"))
    draft = await engine.draft(prompt, forced, options, max_tokens=4, request="draft")
    continued = replace(prompt, compact_ids=(*prompt.compact_ids, *forced))
    turn = await engine.act(continued, Sampling(temperature=0.0, max_tokens=4), request="turn")
    assert draft.token_ids == turn.token_ids
    for option in options:
        alone = await engine.logprobs(continued, [option])
        assert draft.rows[0][option] == pytest.approx(alone[0], abs=1e-4)
    free = await engine.draft(prompt, forced, (), max_tokens=4, request="free")
    assert free.token_ids == turn.token_ids
    for row, token, logprob in zip(free.rows, turn.token_ids, turn.logprobs, strict=True):
        assert row[token] == pytest.approx(logprob, abs=1e-4) == max(row.values())
        assert sum(math.exp(p) for p in row.values()) <= 1 + 1e-6
    assert 0 < option_entropy(draft.rows, options) < 1


async def test_an_episode_passes_the_gate_of_an_engine(engine: Engine, model: Path, tmp_path: Path) -> None:
    task = replace(TASK, video=str(make(tmp_path, Made("v.mp4", frames=100))))
    wire = WireFormat(Reference(model, engine.banned).tokenizer, Wording.load("conf/prompt/tiny.yaml"))
    rules = EpisodeConfig(
        overview_frames=2, min_pixels=784, max_pixels=784, max_context=1024, max_turn_tokens=8
    )

    async def played(gate: GateConfig) -> Trajectory:
        with LocalFrames() as frames:
            return await play(
                task,
                engine,
                frames,
                wire,
                replace(rules, gate=gate),
                id=EpisodeId(0, "t", 0),
                sampling=Sampling(temperature=0.0),
            )

    measured = await played(GateConfig("measure"))
    plain = await played(GateConfig())
    assert measured.expanded_ids == plain.expanded_ids
    noted = measured.extra["gate"]
    assert isinstance(noted, dict)
    assert noted["zoom"]
    assert 0 < noted["uncertainty"] < 1
    # A random model hardly ever closes its answer, and such a draft counts as uncertain: it is closed for it.
    shut = await played(GateConfig("on", threshold=1.0, max_tokens=8))
    if (draft := shut.extra["gate"])["draft"] is None:  # type: ignore[index]
        assert draft["zoom"]  # type: ignore[index]
        assert shut.expanded_ids == plain.expanded_ids
    else:
        assert isinstance(shut.turns[0].action, Written)
        assert (shut.status, shut.answer) == (Status.ANSWERED, draft["draft"])  # type: ignore[index]
