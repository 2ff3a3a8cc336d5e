"""Draft answers and quoted zoom calls with a real engine: log-probs match sampling, tokens are kept as sampled."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from tests.rollout.hf_reference import HfReference, build_tiny_checkpoint, frame
from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.rollout import EngineConfig
from vz_ray.config.zoom_gate import ZoomGateConfig
from vz_ray.env.chat_format import ChatFormat, PromptTemplate
from vz_ray.env.episode_runner import run_episode
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, ExternalAction, SamplingParams, Trajectory
from vz_ray.env.zoom_gate import forced_prefix, option_entropy
from vz_ray.rollout import vllm_requests
from vz_ray.rollout.vllm_engine import VllmEngine
from vz_ray.video.image_grid import ImageGrid
from vz_ray.video.local_source import LocalFrameSource

pytestmark = pytest.mark.asyncio(loop_scope="module")

ASK = "<|im_start|>user\n<image><image>what flashes? A. disc B. ring<|im_end|>\n<|im_start|>assistant\n"
TASK = Task("t", "", "What flashes? A. disc B. ring C. cross", "B")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("draft") / "model")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model: Path, engine_config: EngineConfig) -> AsyncIterator[VllmEngine]:
    engine = await VllmEngine.start(model, engine_config, name="engine", log_file=model.parent / "engine.log")
    yield engine
    await engine.shutdown()


async def test_draft_logprobs_match_sampling(engine: VllmEngine, model: Path) -> None:
    reference = HfReference(model, engine.banned_token_ids)
    prompt = reference.prompt(ASK, [frame(0, 56, 56), frame(1, 28, 56)])
    chat_format = ChatFormat(reference.tokenizer, PromptTemplate.load("conf/prompt/tiny.yaml"), grid=ImageGrid(14, 2))
    forced, options = forced_prefix(chat_format, "<think></think><answer>", ("A", "B", "C"))
    draft = await engine.draft_answer(prompt, forced, options, max_tokens=4, request_id="draft")
    continued = replace(prompt, compact_ids=(*prompt.compact_ids, *forced))
    turn = await engine.generate(continued, SamplingParams(temperature=0.0, max_tokens=4), request_id="turn")
    assert draft.token_ids == turn.token_ids
    for option in options:
        expected = (await engine.compute_logprobs(continued, [option])).logprobs
        assert draft.logprobs[0][option] == pytest.approx(expected[0], abs=1e-4)
    free = await engine.draft_answer(prompt, forced, (), max_tokens=4, request_id="free")
    assert free.token_ids == turn.token_ids
    for row, token, logprob in zip(free.logprobs, turn.token_ids, turn.logprobs, strict=True):
        assert row[token] == pytest.approx(logprob, abs=1e-4) == max(row.values())
        assert sum(math.exp(p) for p in row.values()) <= 1 + 1e-6
    assert 0 < option_entropy(draft.logprobs, options) < 1


async def test_turn_continues_after_a_quoted_call(
    engine: VllmEngine, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens and log-probs equal those of a turn without a stop string."""
    reference = HfReference(model, engine.banned_token_ids)
    prompt = reference.prompt(ASK, [frame(0, 56, 56), frame(1, 28, 56)])
    params = SamplingParams(temperature=0.0, max_tokens=24)
    plain = await engine.generate(prompt, params, request_id="plain")
    pieces = [reference.tokenizer.decode([token]) for token in plain.token_ids]
    stop = next(piece for piece in pieces[4:12] if piece.isascii() and piece.strip())
    monkeypatch.setattr(vllm_requests, "ZOOM_CALL_END", stop)
    stopped = await engine.generate(prompt, params, request_id="stopped")
    assert stopped.stop_reason == "zoom"
    assert len(stopped.token_ids) < len(plain.token_ids)
    texts: list[str] = []
    continued = await engine.generate(
        replace(prompt, in_reasoning=True), params, request_id="continued", on_text=texts.append
    )
    assert continued.token_ids == plain.token_ids
    assert continued.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
    assert continued.stop_reason == plain.stop_reason
    assert continued.versions[0].end == len(stopped.token_ids)
    assert continued.versions[-1].end == len(continued.token_ids)
    assert texts[-1] == reference.tokenizer.decode(continued.token_ids, skip_special_tokens=False)


async def test_gate_works_with_an_engine(engine: VllmEngine, model: Path, tmp_path: Path) -> None:
    task = replace(TASK, video=str(write_video(tmp_path, VideoSpec("v.mp4", frames=100))))
    chat_format = ChatFormat(
        HfReference(model, engine.banned_token_ids).tokenizer,
        PromptTemplate.load("conf/prompt/tiny.yaml"),
        grid=ImageGrid(14, 2),
    )
    config = EpisodeConfig(overview_frames=2, min_pixels=784, max_pixels=784, max_context=1024, max_turn_tokens=8)

    async def run(gate: ZoomGateConfig) -> Trajectory:
        with LocalFrameSource() as frames:
            return await run_episode(
                task,
                engine,
                frames,
                chat_format,
                replace(config, gate=gate),
                episode_id=EpisodeId(0, "t", 0),
                sampling_params=SamplingParams(temperature=0.0),
            )

    measured = await run(ZoomGateConfig("measure"))
    plain = await run(ZoomGateConfig())
    assert measured.expanded_ids == plain.expanded_ids
    decision = measured.extra["gate"]
    assert isinstance(decision, dict)
    assert decision["zoom"]
    assert 0 < decision["uncertainty"] < 1
    # A random model rarely closes its answer. An unclosed draft counts as uncertain.
    gated = await run(ZoomGateConfig("on", threshold=1.0, max_draft_tokens=8))
    if (draft := gated.extra["gate"])["draft"] is None:  # type: ignore[index]
        assert draft["zoom"]  # type: ignore[index]
        assert gated.expanded_ids == plain.expanded_ids
    else:
        assert isinstance(gated.turns[0].action, ExternalAction)
        assert (gated.status, gated.answer) == (EpisodeStatus.ANSWERED, draft["draft"])  # type: ignore[index]
