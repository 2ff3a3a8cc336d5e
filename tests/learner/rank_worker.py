"""One rank of a learner in a process without Ray, and the launcher of two ranks.

python -m tests.learner.rank_worker MODEL OUT STAGE SEQUENCE_PARALLEL_SIZE SCENARIO...
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.learner.training_data import TrainingData, make_training_data, make_varied_data
from vz_ray.config.learner import LearnerConfig, LoraConfig, OptimizerConfig
from vz_ray.config.loss import LossConfig
from vz_ray.env.trajectory import SampledAction, Trajectory
from vz_ray.learner.distributed import shutdown_distributed
from vz_ray.learner.trainer import Trainer
from vz_ray.utils.ports import find_free_port
from vz_ray.weight_sync import WeightSource


def small_config(model: Path | str, stage: int, **changes: Any) -> LearnerConfig:
    settings: dict[str, Any] = {
        "model": str(model),
        "zero_stage": stage,
        "param_persistence_threshold": 0,
        "micro_batch_tokens": 700,
        "logprob_chunk_tokens": 16,
        "mini_batch_size": 2,
        "gradient_checkpointing": False,
        "timeout_s": 120.0,
        # A large epsilon: otherwise Adam amplifies the rounding noise of tiny gradients.
        "optimizer": OptimizerConfig(learning_rate=1e-3, weight_decay=0.0, epsilon=1e-3),
        "loss": LossConfig(kl_coef=0.1, entropy_coef=0.01),
    }
    return LearnerConfig(**(settings | changes))


def small_training_data(model: Path | str) -> TrainingData:
    return make_training_data(model, groups=3, samples=3, overview=3, clip=2, sides=(1, 2))


def text_only_data(model: Path | str) -> TrainingData:
    return make_training_data(model, groups=3, samples=1, overview=0, clip=0, seed=1)


def parameters(trainer: Trainer, source: WeightSource | None = None) -> dict[str, np.ndarray]:
    """Return the tensors of a source; the default is all weights."""
    weights: dict[str, np.ndarray] = {}
    for bucket in (source or trainer.weight_source()).buckets(50_000):
        weights |= {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in bucket.items()}
    return weights


def different_weights(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], device: torch.device) -> list[str]:
    """Return the names of weights that differ.

    On the CPU any bit counts. Kernels of a GPU add in varying order, so there a difference counts above 1 % of a
    tensor's norm and 1e-4 on average.
    """
    if device.type == "cpu":
        return sorted(name for name in expected if not np.array_equal(got[name], expected[name]))
    return sorted(
        name
        for name, values in expected.items()
        if not np.linalg.norm(got[name] - values) <= 1e-2 * np.linalg.norm(values) + 1e-4 * values.size**0.5
    )


def learn(trainer: Trainer, data: TrainingData, out: Path) -> dict[str, Any]:
    """Do an SFT step on part of the data, then a GRPO step of two updates on all data."""
    before = trainer.compute_logprobs(data.trajectories, data.pixels)
    sft = trainer.sft_step(data.trajectories[:5], data.pixels)
    rl = trainer.grpo_step(data.groups, data.pixels)
    np.savez(out / f"learn-{trainer.rank_info.rank}.npz", **parameters(trainer))
    np.savez(out / f"logprobs-{trainer.rank_info.rank}.npz", *before)
    return {"sft": sft, "rl": rl}


def imageless(trainer: Trainer, data: TrainingData, out: Path) -> dict[str, Any]:
    """Train on a batch without images on one rank, and on a batch without trajectories on one rank."""
    text = text_only_data(trainer.config.model)
    mixed = trainer.sft_step([data.trajectories[0], *text.trajectories], data.pixels)
    alone = trainer.sft_step(data.trajectories[:1], data.pixels)
    return {"mixed": mixed, "alone": alone}


def resume(trainer: Trainer, data: TrainingData, out: Path) -> dict[str, Any]:
    """Save and train on; load into another trainer and repeat the step; export."""
    trainer.save_checkpoint(out / "checkpoint")
    first = trainer.grpo_step(data.groups, data.pixels)
    straight, noise = parameters(trainer), torch.rand(3).tolist()
    again = Trainer(trainer.config)
    again.load_checkpoint(out / "checkpoint")
    second = again.grpo_step(data.groups, data.pixels)
    resumed, noise_again = parameters(again), torch.rand(3).tolist()
    again.export_hf(out / "export")
    return {
        "different": different_weights(resumed, straight, trainer.rank_info.device),
        "loss": [first["loss"], second["loss"]],
        "noise": [noise, noise_again],
        "exported": float(sum(np.abs(a).sum() for a in resumed.values())),
    }


def resize(trainer: Trainer, data: TrainingData, out: Path) -> dict[str, Any]:
    """Train three steps with sequences of one rank; and with a step on sequences that two ranks share in between.

    The second run resumes from a checkpoint before and after its second step.
    """
    weights = []
    for name, sizes in {"same": (1, 1, 1), "changed": (1, 2, 1)}.items():
        checkpoint = None
        for step, size in enumerate(sizes):
            if checkpoint is None or name == "changed":
                trainer = Trainer(replace(trainer.config, sequence_parallel_size=size))
                if checkpoint is not None:
                    trainer.load_checkpoint(checkpoint)
            trainer.grpo_step(data.groups, data.pixels)
            checkpoint = out / f"resize-{name}-{step}"
            trainer.save_checkpoint(checkpoint)
        weights.append(parameters(trainer))
    return {"error": max(float(np.abs(values - weights[1][name]).max()) for name, values in weights[0].items())}


def gradients(trainer: Trainer, data: TrainingData, out: Path) -> dict[str, Any]:
    """Save the gradient of one GRPO update on samples with 0 to 4 zooms.

    After the first step, Adam's first moment is the gradient times 1 - beta1.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    trainer = Trainer(replace(trainer.config, optimizer=OptimizerConfig(max_grad_norm=0.0)))
    varied = make_varied_data(trainer.config.model)
    metrics = trainer.grpo_step(varied.groups, varied.pixels)
    assert metrics["updates"] == 1
    gradients: dict[str, np.ndarray] = {}
    for name, p in trainer.policy.hf.named_parameters():
        if trainer.config.zero_stage == 0:
            moment = trainer.engine.optimizer.state[p]["exp_avg"]
        else:
            moment = safe_get_full_optimizer_state(p, "exp_avg")
        gradients[name] = moment.double().cpu().numpy() / (1 - OptimizerConfig().beta1)
    np.savez(out / f"gradients-{trainer.rank_info.rank}.npz", **gradients)
    return metrics


BAD_INDEX = 2
"""Index of the bad trajectory in `with_bad_trajectory`."""


def with_bad_trajectory(trajectories: list[Trajectory]) -> list[Trajectory]:
    """Give one trajectory a temperature that makes its logits infinite and its log-probs NaN."""
    bad = trajectories[BAD_INDEX]
    first, *rest = bad.turns
    assert isinstance(first.action, SampledAction)
    cold = replace(first.action, sampling_params=replace(first.action.sampling_params, temperature=1e-44))
    turns = (replace(first, action=cold), *rest)
    return [*trajectories[:BAD_INDEX], replace(bad, turns=turns), *trajectories[BAD_INDEX + 1 :]]


def skip(trainer: Trainer, data: TrainingData, out: Path) -> dict[str, Any]:
    """Do a step with a bad trajectory, which is on one rank only, then a step without."""
    trainer.config.replay_dir = str(out / "replay")
    before, bad = parameters(trainer), with_bad_trajectory(data.trajectories)
    first = trainer.sft_step(bad, data.pixels)
    after = parameters(trainer)
    second = trainer.sft_step(data.trajectories, data.pixels)
    held_bad_trajectories = sum(
        BAD_INDEX in tree.members for trees in trainer.micro_batches.plan(trainer.encode(bad)) for tree in trees
    )
    return {
        "skipped": [first["skipped"], second["skipped"]],
        "changed": sorted(name for name in before if not np.array_equal(before[name], after[name])),
        "steps": trainer.engine.steps,
        "held_bad_trajectories": held_bad_trajectories,
    }


ADAPTERS = LoraConfig(rank=4, alpha=8.0)


def adapters(trainer: Trainer, data: TrainingData, out: Path) -> dict[str, Any]:
    """Run `learn` with adapters and export the result."""
    adapted = Trainer(replace(trainer.config, lora=replace(ADAPTERS, publishes_adapters=True)))
    report = learn(adapted, data, out)
    np.savez(out / f"published-{trainer.rank_info.rank}.npz", **parameters(adapted, adapted.published_source()))
    adapted.export_hf(out / "adapted")
    return report


def run_two_ranks(
    data: TrainingData, out: Path, stage: int, *scenarios: str, device: str = "cpu", sequence_parallel: int = 1
) -> dict[str, Any]:
    """Run scenarios on two ranks in processes of their own, on `cpu` or two GPUs; return rank 0's report."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port())}
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    on_cpu = {"CUDA_VISIBLE_DEVICES": "", "LOCAL_RANK": "0"} if device == "cpu" else {}
    command = [sys.executable, "-m", "tests.learner.rank_worker", str(data.model), str(out), str(stage)]
    command.append(str(sequence_parallel))
    processes = [
        subprocess.Popen(
            [*command, *scenarios],
            env=os.environ | shared | quiet | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | on_cpu,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    report: dict[str, Any] = json.loads((out / "report-0.json").read_text())
    return report


def assert_close_metrics(got: dict[str, float], expected: dict[str, float]) -> None:
    """Compare metrics, timing excluded."""
    timing = {"seconds", "tokens_per_second", "input_build_seconds", "input_wait_seconds"}
    assert got.keys() == expected.keys()
    for name in expected.keys() - timing:
        assert got[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def main(model: str, out: str, stage: str, sequence_parallel: str, *scenarios: str) -> None:
    # Slices of one or two frames: ranks with fewer frames must make as many passes of the vision tower as the others.
    # Tiles of the MLPs: their number differs between ranks.
    less_memory: dict[str, Any] = {"gradient_checkpointing": True, "vision_slice_patches": 12, "mlp_tile_tokens": 64}
    less_memory = less_memory if stage == "3" else {}
    ranks = {"world_size": 2, "sequence_parallel_size": int(sequence_parallel)}
    trainer = Trainer(small_config(model, int(stage), **ranks, **less_memory))
    data = small_training_data(model)
    report = {name: globals()[name](trainer, data, Path(out)) for name in scenarios}
    (Path(out) / f"report-{trainer.rank_info.rank}.json").write_text(json.dumps(report))
    shutdown_distributed()


if __name__ == "__main__":
    main(*sys.argv[1:])
