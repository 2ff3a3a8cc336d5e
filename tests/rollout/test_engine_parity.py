"""Parity of engine and learner log-probs on equal token ids and pixels; `EngineVariant` has the tolerances."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import torch

from benchmarks.direct_transports import IpcTransport
from tests.rollout.hf_reference import (
    ADAPTERS,
    LINEAR_ATTENTION_ADAPTERS,
    EngineVariant,
    HfReference,
    build_tiny_checkpoint,
    perturb,
)
from vz_ray.config.rollout import EngineConfig
from vz_ray.env.protocols import Prompt
from vz_ray.env.trajectory import SamplingParams
from vz_ray.rollout.vllm_engine import VllmEngine
from vz_ray.weight_sync import (
    ParityCheck,
    ShmTransport,
    TensorSpec,
    WeightIntegrityError,
    WeightPublisher,
    WeightStore,
    WeightTransport,
    WeightUpdate,
    build_parity_probe,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUESTION = "<|im_start|>user\n{images}what flashes?<|im_end|>\n<|im_start|>assistant\n"
OBSERVATION = "<|im_end|>\n<|im_start|>user\n<tool_response>{images}</tool_response><|im_end|>\n<|im_start|>assistant\n"


class EngineUnderTest:
    """An engine, the learner's model and a publisher between them."""

    def __init__(
        self, engine: VllmEngine, reference: HfReference, store: WeightStore, variant: EngineVariant, transport: str
    ) -> None:
        self.engine, self.reference, self.store, self.variant = engine, reference, store, variant
        self.version = 0
        probe = build_parity_probe(reference.tokenizer, reference.processor.image_processor)
        self.publisher = WeightPublisher(timeout_s=60, parity=ParityCheck(probe, dtype=variant.engine_dtype))
        self.transport: WeightTransport = ShmTransport(store, reference.source, reference.score_probe)
        if transport == "ipc":  # in parts that end within layers
            self.transport = IpcTransport(reference.source, reference.score_probe, bucket_bytes=20_000)

    async def train_and_publish(self) -> None:
        self.version += 1
        perturb(self.reference.model, self.version)
        report = await self.publisher.publish(self.version, self.transport, [self.engine])
        assert report.updated == (self.engine.name,)

    def overview(self) -> Prompt:
        """Build a prompt with frames of three sizes, longer than a block of the prefix cache."""
        frame = self.reference.frame
        frames = [frame(i, 4, 3) for i in range(self.variant.overview_frames)]
        frames += [frame(100, 2, 5), frame(101, 1, 1)]
        images = "".join(f"<frame{i}_time{2.0 * i:.2f}s><image>" for i in range(len(frames)))
        return self.reference.prompt(QUESTION.format(images=images), frames)

    async def logprob_difference(self, prompt: Prompt, temperature: float, *, tokens: int = 16, seed: int = 0) -> float:
        sampling = SamplingParams(temperature=temperature, max_tokens=tokens, seed=seed)
        turn = await self.engine.generate(prompt, sampling, request_id="turn")
        return self.variant.difference(turn.logprobs, self.reference.logprobs(prompt, turn.token_ids, temperature))


# Tied weights, transport, engine. On the CPU, the engine of the NCCL transport loads copies from shared memory.
ENGINES = [
    pytest.param((False, "ipc", EngineVariant()), id="untied"),
    pytest.param((True, "nccl", EngineVariant()), id="tied"),
    pytest.param((True, "ipc", EngineVariant(family="qwen3_vl")), id="qwen3_vl-tied"),
    pytest.param((False, "ipc", EngineVariant(family="qwen3_vl_moe")), id="qwen3_vl_moe-untied"),
    pytest.param((True, "ipc", EngineVariant(family="qwen3_5")), id="qwen3_5-tied"),
    pytest.param((False, "ipc", EngineVariant(lora=ADAPTERS)), id="adapters"),
    pytest.param((False, "shm", EngineVariant(family="qwen3_vl")), id="qwen3_vl-untied", marks=pytest.mark.slow),
    pytest.param((False, "shm", EngineVariant(family="qwen3_5")), id="qwen3_5-untied", marks=pytest.mark.slow),
    pytest.param(
        (True, "nccl", EngineVariant(family="qwen3_vl", lora=ADAPTERS)), id="qwen3_vl-adapters", marks=pytest.mark.slow
    ),
    pytest.param(
        (True, "shm", EngineVariant(family="qwen3_5", lora=LINEAR_ATTENTION_ADAPTERS)),
        id="qwen3_5-adapters",
        marks=pytest.mark.slow,
    ),
    pytest.param((False, "ipc", EngineVariant("cuda")), id="cuda-eager-ipc", marks=pytest.mark.gpu),
    pytest.param((False, "ipc", EngineVariant("cuda", lora=ADAPTERS)), id="cuda-adapters-ipc", marks=pytest.mark.gpu),
    pytest.param(
        (True, "shm", EngineVariant("cuda", False, lora=ADAPTERS)), id="cuda-graphs-adapters", marks=pytest.mark.gpu
    ),
    pytest.param((True, "shm", EngineVariant("cuda", False)), id="cuda-graphs-shm", marks=pytest.mark.gpu),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=ENGINES)
async def side(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, engine_config: EngineConfig
) -> AsyncIterator[EngineUnderTest]:
    tied, transport, variant = request.param
    path = tmp_path_factory.mktemp("side")
    model = build_tiny_checkpoint(path / "model", tied=tied, family=variant.family)
    engine = await VllmEngine.start(
        model,
        variant.config(engine_config),
        name="engine",
        log_file=path / "engine.log",
        transport=transport,
        can_sleep=True,
    )
    reference = HfReference(model, engine.banned_token_ids, variant.dtype, variant.device, variant.lora)
    yield EngineUnderTest(engine, reference, WeightStore(path / "weights"), variant, transport)
    await engine.shutdown()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
async def test_logprobs_match_over_turns_and_frame_sizes(side: EngineUnderTest, temperature: float) -> None:
    await side.train_and_publish()
    prompt = side.overview()
    for turn in range(3):
        sampling = SamplingParams(temperature=temperature, max_tokens=10, seed=turn)
        sampled = await side.engine.generate(prompt, sampling, request_id=f"turn{turn}")
        expected = side.reference.logprobs(prompt, sampled.token_ids, temperature)
        assert side.variant.difference(sampled.logprobs, expected) <= side.variant.tolerance
        # The second observation is an error message without frames.
        frames = [] if turn == 1 else [side.reference.frame(40 + turn, 3, 2), side.reference.frame(50 + turn, 1, 4)]
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
    assert await side.logprob_difference(prompt, 1.0) <= side.variant.tolerance
    side.version += 1
    perturb(side.reference.model, side.version)
    update = await ShmTransport(side.store, side.reference.source).prepare(side.version)
    await side.engine.pause(clear_caches=False)
    await side.engine.receive_weights(update)
    await side.engine.resume()
    stale = await side.logprob_difference(prompt, 1.0)
    await side.engine.reset_caches()
    assert stale > (100 if side.variant.engine_dtype == "float32" else 3) * side.variant.tolerance
    assert await side.logprob_difference(prompt, 1.0) <= side.variant.tolerance


async def test_probe_detects_stale_caches(side: EngineUnderTest) -> None:
    if side.variant.lora and side.variant.family == "qwen3_5":
        pytest.skip("the probe is shorter than a block of the prefix cache, and adapters do not change image features")
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
    assert side.variant.difference(turn.logprobs, expected.logprobs) <= side.variant.tolerance


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
            side.variant.difference(sampled.logprobs[start:], expected[start:]) <= side.variant.tolerance
        )
    assert [old, side.version] in versions


@pytest.mark.parametrize("level", [1, 2])
async def test_sleeping_engine_wakes_up_with_new_weights(side: EngineUnderTest, level: int) -> None:
    """Twice: the second cycle starts with allocations of the first."""
    if side.variant.lora and level == 2:
        pytest.skip("a publish of adapters does not restore discarded weights")
    for _ in range(2):
        await side.engine.sleep(level)
        await side.engine.check_health()
        sampling = SamplingParams(max_tokens=8, seed=side.version)
        waiting = asyncio.create_task(side.engine.generate(side.overview(), sampling, request_id="waiting"))
        await side.train_and_publish()
        sampled = await waiting
        assert [span.version for span in sampled.versions] == [side.version]
        expected = side.reference.logprobs(side.overview(), sampled.token_ids)
        assert side.variant.difference(sampled.logprobs, expected) <= side.variant.tolerance


@pytest.mark.gpu
async def test_sleep_frees_weights_and_kv_cache(side: EngineUnderTest) -> None:
    if side.variant.device == "cpu":
        pytest.skip("vLLM keeps its memory on CPU")
    free_awake, _ = torch.cuda.mem_get_info()
    await side.engine.sleep(1 if side.variant.lora else 2)
    free_asleep, _ = torch.cuda.mem_get_info()
    assert free_asleep - free_awake >= 0.25 * 2**30  # the KV cache of `engine_config`
    await side.train_and_publish()


async def test_publishes_do_not_grow_the_memory(side: EngineUnderTest) -> None:
    count = 8 if side.variant.device == "cpu" else 20

    def used_bytes() -> int:
        if side.variant.device == "cuda":
            free, total = torch.cuda.mem_get_info()
            return total - free
        return sum(process.memory_full_info().uss for process in psutil.Process().children(recursive=True))

    async def growth(publishes: int) -> int:
        before = used_bytes()
        for _ in range(publishes):
            side.version += 1
            await side.publisher.publish(side.version, side.transport, [side.engine])
        return used_bytes() - before

    await growth(3)  # buffers exist afterwards
    limit = count / 2 * sum(parameter.nbytes for parameter in side.reference.model.parameters())
    grown: list[int] = []
    # A leak grows in every round; the allocators of a busy machine can grow in one.
    while len(grown) < 3 and (not grown or grown[-1] >= limit):
        grown.append(await growth(count))
    assert grown[-1] < limit, f"bytes by round of {count} publishes: {grown}"


async def test_gpu_uses_the_second_model_runner(side: EngineUnderTest) -> None:
    """The CPU build of vLLM has the first only; both call the token mask."""
    assert side.engine._process.llm.vllm_config.use_v2_model_runner == (side.variant.device == "cuda")


async def test_version_with_missing_tensor_is_rejected(
    side: EngineUnderTest, tmp_path: Path, engine_config: EngineConfig
) -> None:
    """Must be the last test of the module: the engine is unusable afterwards."""
    source, missing = side.reference.source, ("layers.1.mlp.up_proj.weight", "layers.1.mlp.up_proj.lora_B.weight")

    class IncompleteSource:
        def specs(self) -> list[TensorSpec]:
            return [spec for spec in source.specs() if not spec.name.endswith(missing)]

        def buckets(self, max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
            for bucket in source.buckets(max_bytes):
                yield {name: tensor for name, tensor in bucket.items() if not name.endswith(missing)}

    store = WeightStore(tmp_path)
    manifest = store.write_version(99, IncompleteSource())
    info = {"directory": str(store.path(99)), "checksum": manifest.checksum}
    await side.engine.pause()
    with pytest.raises(Exception, match=r"gate_up_proj|layers\.1\.mlp\.up_proj\.lora_B"):
        await side.engine.receive_weights(WeightUpdate(99, manifest.checksum, info, manifest.nbytes))
