"""One rank of a learner without Ray, as torchrun would start it; run by the tests.

python -m tests.learner.rank_worker MODEL OUT STAGE KEEP_WHOLE SCENARIO...
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.learner.training_data import TrainingData, make_training_data, make_varied_data
from vz_ray.config.learner import LearnerConfig, LoraConfig, LossConfig, OptimizerConfig
from vz_ray.env.trajectory import SampledAction, Trajectory
from vz_ray.learner.distributed import shutdown_distributed
from vz_ray.learner.trainer import Trainer


def small_config(model: Path | str, stage: int, **changes: Any) -> LearnerConfig:
    settings: dict[str, Any] = {
        "model": str(model),
        "zero_stage": stage,
        "param_persistence_threshold": 0,
        "micro_batch_tokens": 700,
        "logprob_chunk_tokens": 16,
        "mini_batch_size": 2,
        "gradient_checkpointing": False,
        "num_threads": 1,
        "timeout_s": 120.0,
        # An epsilon far above rounding noise: Adam divides tiny gradients by themselves otherwise.
        "optimizer": OptimizerConfig(learning_rate=1e-3, weight_decay=0.0, epsilon=1e-3),
        "loss": LossConfig(kl_coef=0.1, entropy_coef=0.01),
    }
    return LearnerConfig(**(settings | changes))


def small_training_data(model: Path | str) -> TrainingData:
    return make_training_data(model, groups=3, samples=3, overview=3, clip=2, side=(28, 56))


def text_only_data(model: Path | str) -> TrainingData:
    return make_training_data(model, groups=3, samples=1, overview=0, clip=0, seed=1)


def parameters(trainer: Trainer) -> dict[str, np.ndarray]:
    whole: dict[str, np.ndarray] = {}
    for bucket in trainer.weight_source().buckets(50_000):
        whole |= {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in bucket.items()}
    return whole


def learn(trainer: Trainer, world: TrainingData, out: Path) -> dict[str, Any]:
    """An SFT step on part of the world, then an RL iteration of two updates on all of it."""
    before = trainer.compute_logprobs(world.trajectories, world.pixels)
    sft = trainer.sft_step(world.trajectories[:5], world.pixels)
    rl = trainer.grpo_step(world.groups, world.pixels)
    np.savez(out / f"learn-{trainer.rank_info.rank}.npz", **parameters(trainer))
    np.savez(out / f"logprobs-{trainer.rank_info.rank}.npz", *before)
    return {"sft": sft, "rl": rl}


def imageless(trainer: Trainer, world: TrainingData, out: Path) -> dict[str, Any]:
    """Batches in which a rank has no image, and one in which it has no trajectory at all."""
    text = text_only_data(trainer.config.model)
    mixed = trainer.sft_step([world.trajectories[0], *text.trajectories], world.pixels)
    alone = trainer.sft_step(world.trajectories[:1], world.pixels)
    return {"mixed": mixed, "alone": alone}


def resume(trainer: Trainer, world: TrainingData, out: Path) -> dict[str, Any]:
    """Saves, goes on; another trainer loads and goes the same way. Then exports."""
    trainer.save_checkpoint(out / "checkpoint")
    first = trainer.grpo_step(world.groups, world.pixels)
    straight, noise = parameters(trainer), torch.rand(3).tolist()
    again = Trainer(trainer.config)
    again.load_checkpoint(out / "checkpoint")
    second = again.grpo_step(world.groups, world.pixels)
    resumed, noise_again = parameters(again), torch.rand(3).tolist()
    again.export_hf(out / "export")
    return {
        "different": sorted(n for n in straight if not np.array_equal(straight[n], resumed[n])),
        "loss": [first["loss"], second["loss"]],
        "noise": [noise, noise_again],
        "exported": float(sum(np.abs(a).sum() for a in resumed.values())),
    }


def gradients(trainer: Trainer, world: TrainingData, out: Path) -> dict[str, Any]:
    """The gradient of one RL update as the optimizer is given it; samples zoom 0 to 4 times.

    Adam's first moment after its first step is the gradient times 1 - beta1.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    trainer = Trainer(replace(trainer.config, optimizer=OptimizerConfig(max_grad_norm=0.0)))
    varied = make_varied_data(trainer.config.model)
    metrics = trainer.grpo_step(varied.groups, varied.pixels)
    assert metrics["updates"] == 1
    found: dict[str, np.ndarray] = {}
    for name, p in trainer.policy.hf.named_parameters():
        if trainer.config.zero_stage == 0:
            moment = trainer.engine.optimizer.state[p]["exp_avg"]
        else:
            moment = safe_get_full_optimizer_state(p, "exp_avg")
        found[name] = moment.double().cpu().numpy() / (1 - OptimizerConfig().beta1)
    np.savez(out / f"gradients-{trainer.rank_info.rank}.npz", **found)
    return metrics


BAD_INDEX = 2
"""Which trajectory of a poisoned list is the bad one."""


def poisoned(trajectories: list[Trajectory]) -> list[Trajectory]:
    """One of them sampled at a temperature by which logits become infinite, and log-probs NaN."""
    bad = trajectories[BAD_INDEX]
    first, *rest = bad.turns
    assert isinstance(first.action, SampledAction)
    cold = replace(first.action, sampling_params=replace(first.action.sampling_params, temperature=1e-44))
    turns = (replace(first, action=cold), *rest)
    return [*trajectories[:BAD_INDEX], replace(bad, turns=turns), *trajectories[BAD_INDEX + 1 :]]


def skip(trainer: Trainer, world: TrainingData, out: Path) -> dict[str, Any]:
    """A step with a bad trajectory, which one rank alone sees, then one without."""
    trainer.config.replay_dir = str(out / "replay")
    before, bad = parameters(trainer), poisoned(world.trajectories)
    first = trainer.sft_step(bad, world.pixels)
    after = parameters(trainer)
    second = trainer.sft_step(world.trajectories, world.pixels)
    held = sum(
        BAD_INDEX in tree.members
        for trees in trainer._plan_micro_batches(trainer.encode(bad))
        for tree in trees
    )
    return {
        "skipped": [first["skipped"], second["skipped"]],
        "changed": sorted(name for name in before if not np.array_equal(before[name], after[name])),
        "steps": trainer.engine.steps,
        "held": held,
    }


ADAPTERS = LoraConfig(rank=4, alpha=8.0)


def adapters(trainer: Trainer, world: TrainingData, out: Path) -> dict[str, Any]:
    """The first scenario, with adapters alone; and what is exported."""
    adapted = Trainer(replace(trainer.config, lora=ADAPTERS))
    report = learn(adapted, world, out)
    adapted.export_hf(out / "adapted")
    return report


def main(model: str, out: str, stage: str, *scenarios: str) -> None:
    trainer = Trainer(small_config(model, int(stage), gradient_checkpointing=stage == "3"))
    world = small_training_data(model)
    report = {name: globals()[name](trainer, world, Path(out)) for name in scenarios}
    (Path(out) / f"report-{trainer.rank_info.rank}.json").write_text(json.dumps(report))
    shutdown_distributed()


if __name__ == "__main__":
    main(*sys.argv[1:])
