"""An engine that holds published adapters samples from the learner's policy; it knows nothing of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.learner.rank_worker import ADAPTERS, small_config
from tests.learner.worlds import make_world
from tests.rollout.reference import Reference, frame, gap, tiny
from vz_ray.config.learner import LossConfig, OptimizerConfig
from vz_ray.config.rollout import EngineConfig
from vz_ray.episode.trajectory import Sampling
from vz_ray.learner.trainer import Trainer
from vz_ray.rollout.engine import Engine
from vz_ray.weights import Publisher, ShmSender, WeightStore, build_probe

TOLERANCE = 1e-4


@pytest.mark.slow
async def test_the_engine_samples_from_base_and_adapters(tmp_path: Path, engine_config: EngineConfig) -> None:
    """Twice: the second publish starts from adapters that the first one must not have changed."""
    model = tiny(tmp_path / "model")
    world = make_world(model, groups=2, samples=2, overview=3, clip=2, side=(28, 56))
    fast = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0)
    trainer = Trainer(small_config(model, 0, lora=ADAPTERS, optimizer=fast, loss=LossConfig(kl=0.0)))
    engine = await Engine.start(model, engine_config, name="engine", log=tmp_path / "engine.log")
    try:
        reference = Reference(model, engine.banned)
        probe = build_probe(reference.tokenizer)
        publisher = Publisher(deadline_s=60, probe=probe, tolerance=TOLERANCE)
        sender = ShmSender(WeightStore(tmp_path / "weights"), trainer.source(), lambda: trainer.score(probe))
        frames = [frame(i, 112, 84) for i in range(4)]
        prompt = reference.prompt("<image>" * 4 + "what flashes?", frames)
        untrained = trainer.score(probe)
        for version in (1, 2):
            trainer.sft_step(world.trajectories, world.pixels)
            report = await publisher.publish(version, sender, [engine])
            assert report.updated == (engine.name,)
            trainer.export_hf(tmp_path / f"export-{version}")
            exported = Reference(tmp_path / f"export-{version}", engine.banned)
            sampling = Sampling(temperature=0.7, max_tokens=16, seed=version)
            turn = await engine.act(prompt, sampling, request=f"turn{version}")
            assert gap(turn.logprobs, exported.logprobs(prompt, turn.token_ids, 0.7)) <= TOLERANCE
        assert gap(trainer.score(probe), untrained) > 100 * TOLERANCE
    finally:
        await engine.shutdown()
