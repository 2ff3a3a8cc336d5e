"""Parity of an engine with a trainer of LoRA adapters, merged or published as adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.learner.rank_worker import ADAPTERS, small_config
from tests.learner.training_data import make_training_data
from tests.rollout.hf_reference import HfReference, build_tiny_checkpoint, frame, max_abs_diff
from vz_ray.config.learner import OptimizerConfig
from vz_ray.config.loss import LossConfig
from vz_ray.config.rollout import EngineConfig
from vz_ray.env.trajectory import SamplingParams
from vz_ray.learner.trainer import Trainer
from vz_ray.rollout.vllm_engine import VllmEngine
from vz_ray.weight_sync import ParityCheck, ShmTransport, WeightPublisher, WeightStore, build_parity_probe

TOLERANCE = 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "merged"])
async def test_logprobs_match_the_trainer(tmp_path: Path, engine_config: EngineConfig, adapters: bool) -> None:
    """Publish twice: merging for the first publish must not change the adapters."""
    lora = replace(ADAPTERS, publishes_adapters=adapters)
    model = build_tiny_checkpoint(tmp_path / "model")
    data = make_training_data(model, groups=2, samples=2, overview=3, clip=2, sides=(1, 2))
    fast = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0)
    trainer = Trainer(small_config(model, 0, lora=lora, optimizer=fast, loss=LossConfig(kl_coef=0.0)))
    rank = lora.engine_rank if adapters else 0
    config = replace(engine_config, adapter_rank=rank, adapter_targets=lora.target_modules)
    engine = await VllmEngine.start(model, config, name="engine", log_file=tmp_path / "engine.log")
    try:
        reference = HfReference(model, engine.banned_token_ids)
        probe = build_parity_probe(reference.tokenizer, reference.processor.image_processor)
        publisher = WeightPublisher(timeout_s=60, parity=ParityCheck(probe))
        transport = ShmTransport(WeightStore(tmp_path / "weights"), trainer.published_source(), trainer.score_probe)
        frames = [frame(i, 112, 84) for i in range(4)]
        prompt = reference.prompt("<image>" * 4 + "what flashes?", frames)
        untrained = trainer.score_probe(probe).logprobs
        for version in (1, 2):
            trainer.sft_step(data.trajectories, data.pixels)
            report = await publisher.publish(version, transport, [engine])
            assert report.updated == (engine.name,)
            trainer.export_hf(tmp_path / f"export-{version}")
            exported = HfReference(tmp_path / f"export-{version}", engine.banned_token_ids)
            sampling = SamplingParams(temperature=0.7, max_tokens=16, seed=version)
            turn = await engine.generate(prompt, sampling, request_id=f"turn{version}")
            assert max_abs_diff(turn.logprobs, exported.logprobs(prompt, turn.token_ids, 0.7)) <= TOLERANCE
        assert max_abs_diff(trainer.score_probe(probe).logprobs, untrained) > 100 * TOLERANCE
    finally:
        await engine.shutdown()
