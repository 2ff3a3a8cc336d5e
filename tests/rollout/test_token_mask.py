"""Token mask: vision placeholders are never sampled, and the remaining probabilities are renormalized."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import torch
from transformers import AutoTokenizer

from tests.rollout.hf_reference import (
    GPU_ENGINES,
    EngineVariant,
    HfReference,
    build_tiny_checkpoint,
    frame,
    load_hf_model,
)
from vz_ray.config.rollout import EngineConfig
from vz_ray.env.protocols import Prompt
from vz_ray.env.trajectory import SamplingParams
from vz_ray.rollout.vllm_engine import VllmEngine
from vz_ray.rollout.vllm_process import EngineFailedError
from vz_ray.rollout.vllm_requests import frame_cache_key
from vz_ray.utils.errors import UserError
from vz_ray.utils.timeouts import StepTimeout

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUESTION = "<|im_start|>user\n<image>what?<|im_end|>\n<|im_start|>assistant\n"
ZOOM = "</video_zoom>"


def checkpoint_preferring(path: Path, masked: list[int], fallback: list[int]) -> Path:
    """Build a checkpoint that predicts `masked` almost surely, and often `fallback` if those are masked.

    The layers are disabled and the embeddings share a direction. The output rows of these tokens point in
    the same direction as the last hidden state.
    """
    model = load_hf_model(build_tiny_checkpoint(path))
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
        model.model.language_model.embed_tokens.weight += 0.5
        model.lm_head.weight[masked] = 1.0
        model.lm_head.weight[fallback] = 0.05
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=[pytest.param(EngineVariant(), id="cpu"), *GPU_ENGINES])
def variant(request: pytest.FixtureRequest) -> EngineVariant:
    return request.param


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(
    variant: EngineVariant, tmp_path_factory: pytest.TempPathFactory, engine_config: EngineConfig
) -> AsyncIterator[tuple[VllmEngine, HfReference]]:
    path = tmp_path_factory.mktemp("token_mask")
    config = load_hf_model(build_tiny_checkpoint(path / "model")).config
    pads = [config.image_token_id, config.video_token_id, config.vision_start_token_id]
    [zoom] = AutoTokenizer.from_pretrained(path / "model").encode(ZOOM)
    model = checkpoint_preferring(path / "model", pads, [zoom])
    engine = await VllmEngine.start(
        model, variant.config(engine_config), name="engine", log_file=path / "engine.log", turn_timeout_s=60
    )
    yield engine, HfReference(model, engine.banned_token_ids, variant.dtype, variant.device)
    await engine.shutdown()


@pytest.mark.parametrize("temperature", [2.0, 1.0, 0.7, 0.0])
async def test_placeholders_are_never_sampled(
    variant: EngineVariant, pair: tuple[VllmEngine, HfReference], temperature: float
) -> None:
    engine, reference = pair
    prompt = reference.prompt(QUESTION, [frame(0, 56, 56)])
    masked_probability = reference.logits(prompt)[0].softmax(-1)[reference.banned].sum().item()
    assert reference.model.config.image_token_id in engine.banned_token_ids
    assert masked_probability > 0.99
    for seed in range(4):
        turn = await engine.generate(
            prompt, SamplingParams(temperature, max_tokens=64, seed=seed), request_id=f"turn{seed}"
        )
        assert not set(turn.token_ids) & set(engine.banned_token_ids)
        expected = reference.logprobs(prompt, turn.token_ids, temperature)
        assert variant.difference(turn.logprobs, expected) <= variant.tolerance


async def test_unmasked_probabilities_sum_to_one(variant: EngineVariant, pair: tuple[VllmEngine, HfReference]) -> None:
    engine, reference = pair
    prompt = reference.prompt(QUESTION, [frame(0, 56, 56)])
    allowed = [i for i in range(reference.model.config.text_config.vocab_size) if i not in engine.banned_token_ids]
    logits = reference.logits(prompt)[0]
    expected = logits[allowed].log_softmax(-1)[:8].tolist()
    actual = [
        (await engine.compute_logprobs(prompt, [token], request_id=f"t{token}")).logprobs[0] for token in allowed[:8]
    ]
    assert variant.difference(expected, actual) <= variant.tolerance


async def test_turn_stops_after_a_zoom_call(pair: tuple[VllmEngine, HfReference]) -> None:
    engine, reference = pair
    prompt = reference.prompt(QUESTION, [frame(0, 56, 56)])
    [zoom] = reference.tokenizer.encode(ZOOM)
    for seed in range(4):
        turn = await engine.generate(prompt, SamplingParams(max_tokens=200, seed=seed), request_id=f"stop{seed}")
        assert turn.stop_reason == "zoom"
        assert turn.token_ids.index(zoom) == len(turn.token_ids) - 1
        assert len(turn.logprobs) == len(turn.token_ids)


async def test_truncated_turn_has_stop_reason_length(pair: tuple[VllmEngine, HfReference]) -> None:
    engine, reference = pair
    prompt = reference.prompt(QUESTION, [frame(0, 56, 56)])
    turn = await engine.generate(prompt, SamplingParams(max_tokens=1, seed=1), request_id="cut")
    assert len(turn.token_ids) == 1
    assert turn.stop_reason == ("zoom" if reference.tokenizer.decode(turn.token_ids) == ZOOM else "length")


async def test_seeded_and_greedy_sampling_are_deterministic(pair: tuple[VllmEngine, HfReference]) -> None:
    engine, reference = pair
    prompt = reference.prompt(QUESTION, [frame(1, 28, 84)])

    async def ids(sampling: SamplingParams, name: str) -> tuple[int, ...]:
        return (await engine.generate(prompt, sampling, request_id=name)).token_ids

    assert await ids(SamplingParams(seed=7, max_tokens=20), "a") == await ids(
        SamplingParams(seed=7, max_tokens=20), "b"
    )
    assert await ids(SamplingParams(seed=7, max_tokens=20), "c") != await ids(
        SamplingParams(seed=8, max_tokens=20), "d"
    )
    greedy = SamplingParams(temperature=0, max_tokens=20)
    assert await ids(greedy, "e") == await ids(greedy, "f")


async def test_seeds_work_with_chunked_prefill(pair: tuple[VllmEngine, HfReference]) -> None:
    """The prompts together exceed the token budget of one engine step."""
    engine, reference = pair
    question = QUESTION.replace("what?", "what flashes? " * 200)
    prompts = [reference.prompt(question, [frame(seed, 56, 56)]) for seed in range(8)]
    assert sum(len(prompt.compact_ids) for prompt in prompts) > 2048
    sampling = SamplingParams(seed=7, max_tokens=8)
    reference_turn = await engine.generate(prompts[-1], sampling, request_id="reference_turn")
    await engine.reset_caches()
    turns = [engine.generate(prompt, sampling, request_id=f"part{i}") for i, prompt in enumerate(prompts)]
    assert (await asyncio.gather(*turns))[-1].token_ids == reference_turn.token_ids


async def test_mismatched_frames_and_pads_are_rejected(pair: tuple[VllmEngine, HfReference]) -> None:
    engine, reference = pair
    prompt = reference.prompt(QUESTION, [frame(1, 28, 84)])
    short = Prompt(prompt.compact_ids, (*prompt.frames, frame(2, 28, 28)), ())
    with pytest.raises(ValueError, match="1 image slots for 2 frames"):
        await engine.generate(short, SamplingParams(), request_id="odd")
    assert (await engine.generate(prompt, SamplingParams(max_tokens=2), request_id="after")).token_ids


async def test_prompt_beyond_context_is_rejected(pair: tuple[VllmEngine, HfReference]) -> None:
    engine, reference = pair
    prompt = reference.prompt("what? " * 2000, [])
    with pytest.raises(ValueError, match="turn long"):
        await engine.generate(prompt, SamplingParams(), request_id="long")


async def test_training_rejects_top_p(pair: tuple[VllmEngine, HfReference]) -> None:
    engine, reference = pair
    with pytest.raises(ValueError, match="training needs top_p=1"):
        await engine.generate(reference.prompt("what?", []), SamplingParams(top_p=0.9), request_id="cut")


async def test_turn_timeout_names_engine_and_keeps_it_usable(
    pair: tuple[VllmEngine, HfReference],
) -> None:
    engine, reference = pair
    prompt = reference.prompt(QUESTION, [frame(1, 28, 84)])
    await engine.pause()
    engine._process.timeout_s = 0.2
    with pytest.raises(StepTimeout, match="engine did not finish turn never"):
        await engine.generate(prompt, SamplingParams(), request_id="never")
    engine._process.timeout_s = 60
    await engine.resume()
    assert (await engine.generate(prompt, SamplingParams(max_tokens=2), request_id="after")).token_ids
    assert engine.stats().running_turns == 0


async def test_frame_cache_key_includes_the_shape() -> None:
    wide, tall = frame(1, 56, 28), frame(1, 28, 56)
    assert wide.rgb.tobytes() == tall.rgb.tobytes()
    assert frame_cache_key(wide) != frame_cache_key(tall)


async def test_missing_checkpoint_is_named(tmp_path: Path, engine_config: EngineConfig) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        await VllmEngine.start(tmp_path, engine_config, name="engine", log_file=tmp_path / "log")


async def test_killed_engine_fails_its_turn(pair: tuple[VllmEngine, HfReference]) -> None:
    """Must be the last test with this engine, which is stopped first, so that the turn cannot end before the kill."""
    engine, reference = pair
    engine_process = max(psutil.Process().children(recursive=True), key=lambda child: child.memory_info().rss)
    engine_process.suspend()
    turn = asyncio.create_task(engine.generate(reference.prompt("what?", []), SamplingParams(), request_id="long"))
    assert not (await asyncio.wait({turn}, timeout=0.5))[0]
    engine_process.kill()
    with pytest.raises(EngineFailedError, match="engine failed at turn long"):
        await asyncio.wait_for(turn, 30)
    with pytest.raises(EngineFailedError):
        await engine.check_health()
