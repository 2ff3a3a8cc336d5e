"""Parity of engine and learner log-probs on equal token ids and pixels.

Both compute in float32 on the same CPU, so only rounding differs. The tolerance of 1e-4 is about fifty
times the typical difference.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.rollout.hf_reference import HfReference, build_tiny_checkpoint, frame, max_abs_diff, perturb
from vz_ray.config.rollout import EngineConfig
from vz_ray.env.protocols import Prompt
from vz_ray.env.trajectory import SamplingParams
from vz_ray.rollout.vllm_engine import VllmEngine
from vz_ray.weight_sync import (
    ModuleSource,
    ParityCheck,
    ShmTransport,
    WeightIntegrityError,
    WeightPublisher,
    WeightStore,
    WeightUpdate,
    build_parity_probe,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOLERANCE = 1e-4
QUESTION = "<|im_start|>user\n{images}what flashes?<|im_end|>\n<|im_start|>assistant\n"
OBSERVATION = "<|im_end|>\n<|im_start|>user\n<tool_response>{images}</tool_response><|im_end|>\n<|im_start|>assistant\n"


class EngineUnderTest:
    """An engine, the learner's model and a publisher between them."""

    def __init__(self, engine: VllmEngine, reference: HfReference, store: WeightStore) -> None:
        self.engine, self.reference, self.store = engine, reference, store
        self.version = 0
        probe = build_parity_probe(reference.tokenizer, reference.processor.image_processor)
        self.publisher = WeightPublisher(timeout_s=60, parity=ParityCheck(probe))
        self.transport = ShmTransport(store, ModuleSource(reference.model), reference.score_probe)

    async def train_and_publish(self) -> None:
        self.version += 1
        perturb(self.reference.model, self.version)
        report = await self.publisher.publish(self.version, self.transport, [self.engine])
        assert report.updated == (self.engine.name,)

    def overview(self) -> Prompt:
        """Build a prompt with frames of three sizes, longer than a block of the prefix cache."""
        frames = [frame(i, 112, 84) for i in range(12)] + [frame(20, 56, 140), frame(21, 28, 28)]
        images = "".join(f"<frame{i}_time{2.0 * i:.2f}s><image>" for i in range(len(frames)))
        return self.reference.prompt(QUESTION.format(images=images), frames)

    async def max_logprob_diff(self, prompt: Prompt, temperature: float, *, tokens: int = 16, seed: int = 0) -> float:
        sampling = SamplingParams(temperature=temperature, max_tokens=tokens, seed=seed)
        turn = await self.engine.generate(prompt, sampling, request_id="turn")
        return max_abs_diff(turn.logprobs, self.reference.logprobs(prompt, turn.token_ids, temperature))


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[False, True], ids=["untied", "tied"])
async def side(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, engine_config: EngineConfig
) -> AsyncIterator[EngineUnderTest]:
    path = tmp_path_factory.mktemp("side")
    model = build_tiny_checkpoint(path / "model", tied=request.param)
    # Engines with the NCCL and IPC backends also load copies from shared memory.
    transport = "nccl" if request.param else "ipc"
    engine = await VllmEngine.start(
        model, engine_config, name="engine", log_file=path / "engine.log", transport=transport
    )
    side = EngineUnderTest(engine, HfReference(model, engine.banned_token_ids), WeightStore(path / "weights"))
    yield side
    await engine.shutdown()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
async def test_logprobs_match_over_turns_and_frame_sizes(side: EngineUnderTest, temperature: float) -> None:
    await side.train_and_publish()
    prompt = side.overview()
    for turn in range(3):
        sampling = SamplingParams(temperature=temperature, max_tokens=10, seed=turn)
        sampled = await side.engine.generate(prompt, sampling, request_id=f"turn{turn}")
        expected = side.reference.logprobs(prompt, sampled.token_ids, temperature)
        assert max_abs_diff(sampled.logprobs, expected) <= TOLERANCE
        # The second observation is an error message without frames.
        frames = [] if turn == 1 else [frame(40 + turn, 84, 56), frame(50 + turn, 28, 112)]
        text = OBSERVATION.format(images="<image>" * len(frames))
        prompt = side.reference.extend(prompt, sampled.token_ids, text, frames)


async def test_published_weights_are_loaded_and_labelled(side: EngineUnderTest) -> None:
    before = await side.engine.generate(side.overview(), SamplingParams(max_tokens=4, seed=1), request_id="before")
    await side.train_and_publish()
    after = await side.engine.generate(side.overview(), SamplingParams(max_tokens=4, seed=1), request_id="after")
    assert [span.version for span in after.versions] == [side.version]
    assert [span.version for span in before.versions] == [side.version - 1]
    assert before.logprobs != after.logprobs


async def test_stale_caches_change_logprobs(side: EngineUnderTest) -> None:
    """Verify that the parity tests can detect stale caches, by keeping the caches in a publish."""
    await side.train_and_publish()
    prompt = side.overview()
    assert await side.max_logprob_diff(prompt, 1.0) <= TOLERANCE
    side.version += 1
    perturb(side.reference.model, side.version)
    update = await side.transport.prepare(side.version)
    await side.engine.pause(clear_caches=False)
    await side.engine.receive_weights(update)
    await side.engine.resume()
    stale = await side.max_logprob_diff(prompt, 1.0)
    await side.engine.reset_caches()
    assert stale > 100 * TOLERANCE
    assert await side.max_logprob_diff(prompt, 1.0) <= TOLERANCE


async def test_probe_detects_stale_caches(side: EngineUnderTest) -> None:
    await side.train_and_publish()

    class CacheKeepingEngine(VllmEngine):
        async def pause(self, *, clear_caches: bool = True) -> None:
            await super().pause(clear_caches=False)

    stale_engine = CacheKeepingEngine.__new__(CacheKeepingEngine)
    stale_engine.__dict__ = side.engine.__dict__
    side.version += 1
    perturb(side.reference.model, side.version)
    with pytest.raises(WeightIntegrityError, match="differ from the learner's"):
        await side.publisher.publish(side.version, side.transport, [stale_engine])
    await side.engine.reset_caches()
    await side.engine.resume()
    await side.train_and_publish()


async def test_prefix_cache_serves_the_shared_prefix(side: EngineUnderTest) -> None:
    prompt = side.overview()
    await side.engine.generate(prompt, SamplingParams(max_tokens=2), request_id="first")
    before = side.engine.stats()
    await side.engine.generate(prompt, SamplingParams(max_tokens=2), request_id="second")
    after = side.engine.stats()
    assert after.cached_tokens > before.cached_tokens
    assert after.sampled_tokens - before.sampled_tokens == 2
    num_frames = len(prompt.frames)
    assert (after.frames - before.frames, after.cached_frames - before.cached_frames) == (
        num_frames,
        num_frames,
    )


async def test_turn_is_resent_after_a_frame_left_the_cache(
    side: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM drops a frame from its frontend cache between the lookup and the use, as after a cache miss elsewhere."""
    from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache

    prompt = side.overview()
    expected = await side.engine.generate(prompt, SamplingParams(max_tokens=4, seed=3), request_id="cached")
    lookups: list[list[bool]] = []
    original = LruKeyReplicatedSenderCache.is_cached

    def is_cached(self: LruKeyReplicatedSenderCache, mm_hashes: list[str]) -> list[bool]:
        cached = original(self, mm_hashes)
        if not lookups:
            self.invalidate(mm_hashes[0])
        lookups.append(cached)
        return cached

    monkeypatch.setattr(LruKeyReplicatedSenderCache, "is_cached", is_cached)
    turn = await side.engine.generate(prompt, SamplingParams(max_tokens=4, seed=3), request_id="dropped")
    assert len(lookups) >= 2
    assert all(lookups[0])
    assert not lookups[1][0]
    assert turn.token_ids == expected.token_ids
    assert max_abs_diff(turn.logprobs, expected.logprobs) <= TOLERANCE


async def test_kv_cache_usage_follows_running_turns(side: EngineUnderTest) -> None:
    turn = asyncio.create_task(side.engine.generate(side.overview(), SamplingParams(max_tokens=400), request_id="long"))
    used = 0
    while not turn.done():
        await asyncio.sleep(0.01)
        used = max(used, side.engine.stats().kv_cache_used_tokens)
    # The scheduler reports the end of a turn with a delay.
    await side.engine.generate(side.overview(), SamplingParams(max_tokens=2), request_id="short")
    after = side.engine.stats()
    assert len(side.overview().compact_ids) < used <= after.kv_cache_tokens
    assert after.kv_cache_used_tokens < used


async def test_running_turns_continue_with_new_weights(side: EngineUnderTest) -> None:
    await side.train_and_publish()
    old = side.version
    turns = [
        asyncio.create_task(
            side.engine.generate(side.overview(), SamplingParams(max_tokens=600, seed=seed), request_id=f"long{seed}")
        )
        for seed in range(6)
    ]
    # The short turn was submitted later and has finished, so the long turns are running.
    await side.engine.generate(side.overview(), SamplingParams(max_tokens=2), request_id="short")
    await side.train_and_publish()
    versions = []
    for sampled in await asyncio.gather(*turns):
        spans = sampled.versions
        assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
        assert spans[-1].end == len(sampled.token_ids)
        versions.append([span.version for span in spans])
        # Tokens sampled with the new weights depend on recomputed keys and values of the prefix.
        expected = side.reference.logprobs(side.overview(), sampled.token_ids)
        start = spans[-1].start
        assert spans[-1].version != side.version or (
            max_abs_diff(sampled.logprobs[start:], expected[start:]) <= TOLERANCE
        )
    assert [old, side.version] in versions


async def test_version_with_missing_tensor_is_rejected(
    side: EngineUnderTest, tmp_path: Path, engine_config: EngineConfig
) -> None:
    """Must be the last test of the module: the engine is unusable afterwards."""

    class IncompleteSource(ModuleSource):
        def specs(self):  # type: ignore[no-untyped-def]
            return [spec for spec in super().specs() if not spec.name.endswith("layers.1.mlp.up_proj.weight")]

    store = WeightStore(tmp_path)
    manifest = store.write_version(99, IncompleteSource(side.reference.model))
    info = {"directory": str(store.path(99)), "checksum": manifest.checksum}
    await side.engine.pause()
    with pytest.raises(Exception, match="gate_up_proj"):
        await side.engine.receive_weights(WeightUpdate(99, manifest.checksum, info, manifest.nbytes))
