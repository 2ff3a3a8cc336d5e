"""Engines and weight transfer on two GPUs, without Ray: the learner's model is on GPU 0."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.direct_transports import NcclTransport
from tests.rollout.hf_reference import EngineVariant, HfReference, build_tiny_checkpoint
from tests.rollout.test_engine_parity import EngineUnderTest
from tests.small_run import survivors
from vz_ray.config.rollout import EngineConfig
from vz_ray.env.trajectory import SamplingParams
from vz_ray.rollout.vllm_engine import VllmEngine
from vz_ray.weight_sync import ModuleSource, WeightIntegrityError, WeightStore

pytestmark = [pytest.mark.gpu(2), pytest.mark.timeout(600)]

CONFIG = EngineConfig(kv_cache_gib=0.25, max_model_len=1024, max_num_seqs=8)
VARIANT = EngineVariant("cuda")
MAX_GROWTH_BYTES = 64 << 20
"""A communicator holds several hundred MiB on each GPU."""


@asynccontextmanager
async def start_side(path: Path, *, transport: str, gpus: str, **changes: Any) -> AsyncIterator[EngineUnderTest]:
    """Start an engine on the given GPUs, and a reference model on GPU 0."""
    model = build_tiny_checkpoint(path / "model")
    config = replace(VARIANT.config(CONFIG), **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        engine = await VllmEngine.start(model, config, name="engine", log_file=path / "engine.log", transport=transport)
    reference = HfReference(model, engine.banned_token_ids, VARIANT.dtype, "cuda:0")
    side = EngineUnderTest(engine, reference, WeightStore(path / "weights"), VARIANT, "shm")
    if transport == "nccl":
        side.transport = NcclTransport(ModuleSource(reference.model), reference.score_probe)
    try:
        yield side
    finally:
        await engine.shutdown()


def used_bytes() -> list[int]:
    """Return the used memory of both GPUs, by all processes."""
    return [total - free for free, total in map(torch.cuda.mem_get_info, range(2))]


async def test_nccl_publish_and_five_new_groups(tmp_path: Path) -> None:
    """Publish while turns run; each new group replaces the communicators of the old one."""
    async with start_side(tmp_path, transport="nccl", gpus="1") as side:
        assert isinstance(side.transport, NcclTransport)
        await side.train_and_publish()
        for seed in range(6):
            sampling = SamplingParams(max_tokens=200, seed=seed)
            turn = asyncio.create_task(side.engine.generate(side.overview(), sampling, request_id=f"turn{seed}"))
            side.transport.reopen = True
            await side.train_and_publish()
            await turn
            if seed == 0:
                before = used_bytes()
        assert await side.logprob_difference(side.overview(), 1.0) <= VARIANT.tolerance
        growth = [now - then for now, then in zip(used_bytes(), before, strict=True)]
        assert max(growth) < MAX_GROWTH_BYTES, growth


class KillingSource(ModuleSource):
    """Weights whose first bucket kills the receiving engine, after the broadcast has been announced."""

    victims: tuple[psutil.Process, ...] = ()

    def buckets(self, max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
        for process in self.victims:
            process.kill()
        yield from super().buckets(max_bytes)


async def test_engine_kill_in_the_broadcast_fails_the_publish(tmp_path: Path) -> None:
    """The sender is aborted instead of waiting for its peer, and reaches a new engine afterwards."""
    async with start_side(tmp_path / "first", transport="nccl", gpus="1") as side:
        source = KillingSource(side.reference.model)
        side.transport = NcclTransport(source, side.reference.score_probe)
        await side.train_and_publish()
        source.victims = tuple(psutil.Process().children(recursive=True))
        with pytest.raises(WeightIntegrityError):
            await asyncio.wait_for(side.train_and_publish(), 90)
        assert not survivors(list(source.victims))
    async with start_side(tmp_path / "second", transport="nccl", gpus="1") as side:
        await side.train_and_publish()


async def test_tensor_parallel_engine_loads_published_weights(tmp_path: Path) -> None:
    async with start_side(tmp_path, transport="shm", gpus="0,1", tensor_parallel_size=2) as side:
        for temperature in (1.0, 0.7):
            await side.train_and_publish()
            assert await side.logprob_difference(side.overview(), temperature) <= VARIANT.tolerance
