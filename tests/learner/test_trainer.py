"""The trainer on one rank in this process and on two rank processes, with DeepSpeed and gloo."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.learner.rank_worker import (
    assert_close_metrics,
    gradients,
    imageless,
    learn,
    parameters,
    resume,
    run_two_ranks,
    small_config,
    small_training_data,
)
from tests.learner.training_data import TrainingData
from tests.rollout.hf_reference import HfReference
from vz_ray.config.learner import LearnerConfig, OptimizerConfig
from vz_ray.config.loss import LossConfig
from vz_ray.learner import checkpoint, train_engine
from vz_ray.learner.checkpoint_files import MANIFEST, CheckpointError
from vz_ray.learner.policy_model import PolicyModel
from vz_ray.learner.train_engine import learning_rate
from vz_ray.learner.trainer import Trainer

SCENARIOS = ("gradients", "learn", "imageless", "resume")


@pytest.fixture(scope="module")
def single_rank(data: TrainingData, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Reports of the scenarios on one rank without sharding, and their output directory."""
    out = tmp_path_factory.mktemp("single_rank")
    trainer = Trainer(small_config(data.model, 0))
    report = {"learn": learn(trainer, data, out), "imageless": imageless(trainer, data, out)}
    apart = Trainer(small_config(data.model, 0, share_prefixes=False))
    report["gradients"] = gradients(apart, data, out)
    report["resume"] = resume(trainer, data, out)
    return report, out


@pytest.mark.parametrize(
    ("stage", "shards", "device"),
    [
        (0, 1, "cpu"),
        (2, 1, "cpu"),
        (3, 1, "cpu"),
        (3, 2, "cpu"),
        pytest.param(0, 2, "cpu", marks=pytest.mark.slow),
        pytest.param(3, 1, "cuda", marks=pytest.mark.gpu(2)),
        pytest.param(3, 2, "cuda", marks=pytest.mark.gpu(2)),
    ],
)
def test_two_ranks_match_one_rank(
    data: TrainingData, single_rank: tuple[dict[str, Any], Path], tmp_path: Path, stage: int, shards: int, device: str
) -> None:
    """SFT and GRPO steps, ranks without images or trajectories, resume, export.

    Metrics and weights agree up to the order of additions: under ZeRO-3 with gradient checkpointing and slices of the
    vision tower too, and if two ranks share each sequence.
    """
    expected, reference = single_rank
    got = run_two_ranks(data, tmp_path, stage, *SCENARIOS, device=device, sequence_parallel=shards)
    assert_same_gradients(tmp_path / "gradients-1.npz", reference / "gradients-0.npz")
    assert_close_metrics(got["gradients"], expected["gradients"])
    for scenario in ("learn", "imageless"):
        for step, metrics in expected[scenario].items():
            assert_close_metrics(got[scenario][step], metrics)
    single, double = np.load(reference / "learn-0.npz"), np.load(tmp_path / "learn-0.npz")
    assert set(single.files) == set(double.files)
    for name in single.files:
        np.testing.assert_allclose(double[name], single[name], atol=2e-6, rtol=0, err_msg=name)
    before, then = np.load(reference / "logprobs-0.npz"), np.load(tmp_path / "logprobs-1.npz")
    for name in before.files:
        np.testing.assert_allclose(then[name], before[name], atol=1e-5, rtol=0)
    assert_resumed(got["resume"], exact=device == "cpu")
    assert_exported(tmp_path / "export", data.model, got["resume"])


def test_ranks_share_sequences_under_zero_1_and_resume_with_another_size(
    data: TrainingData, single_rank: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    expected, reference = single_rank
    got = run_two_ranks(data, tmp_path, 1, "learn", "resize", sequence_parallel=2)
    for step, metrics in expected["learn"].items():
        assert_close_metrics(got["learn"][step], metrics)
    single, double = np.load(reference / "learn-0.npz"), np.load(tmp_path / "learn-0.npz")
    for name in single.files:
        np.testing.assert_allclose(double[name], single[name], atol=2e-6, rtol=0, err_msg=name)
    assert got["resize"]["error"] <= 2e-6


def assert_same_gradients(got: Path, expected: Path) -> None:
    """Compare shared prefixes on two ranks with one sequence per trajectory on one rank."""
    mine, theirs = np.load(got), np.load(expected)
    assert set(mine.files) == set(theirs.files)
    assert any("visual" in name for name in theirs.files)
    for name in theirs.files:
        error = np.linalg.norm(mine[name] - theirs[name]) / max(np.linalg.norm(theirs[name]), 1e-30)
        assert error <= 1e-4, f"{name}: {error:.1e}"


def assert_resumed(report: dict[str, Any], *, exact: bool) -> None:
    assert report["different"] == []
    assert report["loss"][0] == pytest.approx(report["loss"][1], rel=0 if exact else 1e-3, abs=0)
    assert report["noise"][0] == report["noise"][1]


def assert_exported(directory: Path, base: Path, report: dict[str, Any]) -> None:
    policy = PolicyModel.from_pretrained(directory)
    total = sum(float(p.detach().abs().sum()) for p in policy.hf.parameters())
    assert total == pytest.approx(report["exported"], rel=1e-5)
    assert policy.tokens == PolicyModel.from_pretrained(base).tokens


def test_one_rank_resumes_bit_for_bit(
    default_device: torch.device, data: TrainingData, single_rank: tuple[dict[str, Any], Path]
) -> None:
    """On a GPU, up to the order of additions."""
    report, out = single_rank
    assert_resumed(report["resume"], exact=default_device.type == "cpu")
    assert_exported(out / "export", data.model, report["resume"])


def test_load_refuses_incomplete_and_damaged_checkpoints(data: TrainingData, tmp_path: Path) -> None:
    trainer = Trainer(small_config(data.model, 0, loss=LossConfig(kl_coef=0.0)))
    trainer.save_checkpoint(tmp_path / "good")
    manifest = json.loads((tmp_path / "good" / MANIFEST).read_text())
    with pytest.raises(FileExistsError, match="already exists"):
        trainer.save_checkpoint(tmp_path / "good")
    name = max(manifest["files"], key=lambda n: (tmp_path / "good" / n).stat().st_size)
    original = (tmp_path / "good" / name).read_bytes()
    (tmp_path / "good" / name).write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="is damaged"):
        trainer.load_checkpoint(tmp_path / "good")
    (tmp_path / "good" / name).unlink()
    with pytest.raises(CheckpointError, match="lacks"):
        trainer.load_checkpoint(tmp_path / "good")
    (tmp_path / "good" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        trainer.load_checkpoint(tmp_path / "good")


def test_failed_save_leaves_no_checkpoint(data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(small_config(data.model, 0, loss=LossConfig(kl_coef=0.0)))

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_shards", fail)
        with pytest.raises(OSError, match="disk full"):
            trainer.save_checkpoint(tmp_path / "step")
    assert not (tmp_path / "step").exists()
    trainer.save_checkpoint(tmp_path / "step")
    assert (tmp_path / "step" / MANIFEST).exists()


def test_sft_overfits_a_batch_and_keeps_a_frozen_tower(data: TrainingData) -> None:
    config = small_config(
        data.model,
        0,
        freeze_vision=True,
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.0),
        loss=LossConfig(kl_coef=0.0),
    )
    trainer = Trainer(config)
    before = parameters(trainer)
    losses = [trainer.sft_step(data.trajectories[:2], data.pixels)["loss"] for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]
    changed = {name for name, value in parameters(trainer).items() if not np.array_equal(value, before[name])}
    assert changed
    assert not any("visual" in name for name in changed)


def test_grpo_raises_best_and_lowers_worst_samples(data: TrainingData) -> None:
    loss = LossConfig(kl_coef=0.01, entropy_coef=0.0, aggregation="token_mean")
    trainer = Trainer(small_config(data.model, 0, loss=loss, mini_batch_size=8))
    before = [float(row.sum()) for row in trainer.compute_logprobs(data.trajectories, data.pixels)]
    for _ in range(3):
        metrics = trainer.grpo_step(data.groups, data.pixels)
    after = [float(row.sum()) for row in trainer.compute_logprobs(data.trajectories, data.pixels)]
    gains = iter(after[i] - before[i] for i in range(len(after)))
    for group in data.groups:
        own = [next(gains) for _ in group.trajectories]
        assert own[int(np.argmax(group.rewards))] > own[int(np.argmin(group.rewards))]
    assert metrics["kl"] > 0
    assert metrics["ratio_max"] == 1.0  # one update per step: old and new log-probs are equal


def test_first_step_has_zero_kl_and_ratio_one(data: TrainingData) -> None:
    trainer = Trainer(small_config(data.model, 0, mini_batch_size=8))
    metrics = trainer.grpo_step(data.groups, data.pixels)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["clip_low"] == metrics["clip_high"] == 0


def test_mismatch_metrics_measure_engine_difference(data: TrainingData) -> None:
    """Engine log-probs equal the learner's, except for 0.75 on one token of one trajectory."""
    trainer = Trainer(small_config(data.model, 0, mini_batch_size=8))
    rows = iter(trainer.compute_logprobs(data.trajectories, data.pixels))
    groups, first = [], True
    for group in data.groups:
        trajectories = []
        for trajectory in group.trajectories:
            left = [float(p) + (0.75 if first and i == 0 else 0.0) for i, p in enumerate(next(rows))]
            first, turns = False, []
            for turn in trajectory.turns:
                own = tuple(left[: len(turn.action.token_ids)])
                left = left[len(own) :]
                turns.append(replace(turn, action=replace(turn.action, logprobs=own)))
            trajectories.append(replace(trajectory, turns=tuple(turns)))
        groups.append(replace(group, trajectories=tuple(trajectories)))
    metrics = trainer.grpo_step(groups, data.pixels)
    tokens = sum(sum(t.loss_mask) for t in data.trajectories)
    assert metrics["mismatch_abs_max"] == pytest.approx(0.75, abs=1e-5)
    assert metrics["mismatch_kl"] == pytest.approx((np.exp(-0.75) + 0.75 - 1) / tokens, rel=1e-3)
    assert metrics["mismatch_sequence_abs_max"] == pytest.approx(0.75, abs=1e-4)
    assert metrics["mismatch_sequence_abs_mean"] == pytest.approx(0.75 / len(data.trajectories), abs=1e-4)
    assert metrics["mismatch_sequence_outlier_rate"] == pytest.approx(1 / len(data.trajectories))


def test_uninformative_groups_change_nothing(data: TrainingData) -> None:
    trainer = Trainer(small_config(data.model, 0, loss=LossConfig(kl_coef=0.0)))
    before = parameters(trainer)
    flat = [
        replace(
            group,
            trajectories=tuple(replace(t, reward=replace(t.reward, total=1.0)) for t in group.trajectories if t.reward),
        )
        for group in data.groups
    ]
    metrics = trainer.grpo_step(flat, data.pixels)
    assert metrics == {"groups": 0, "groups_dropped": 3, "updates": 0}
    assert all(np.array_equal(value, before[name]) for name, value in parameters(trainer).items())


def test_old_logprobs_can_come_from_the_engine(data: TrainingData) -> None:
    loss = LossConfig(kl_coef=0.0, entropy_coef=0.0)
    trainer = Trainer(small_config(data.model, 0, old_logprobs="engine", mini_batch_size=8, loss=loss))
    rows = trainer.compute_logprobs(data.trajectories, data.pixels)
    engine = [np.asarray(t.sampled_logprobs) for t in data.trajectories]
    expected = max(float(np.exp(np.abs(r - e)).max()) for r, e in zip(rows, engine, strict=True))
    assert trainer.grpo_step(data.groups, data.pixels)["ratio_max"] == pytest.approx(expected, rel=1e-3)


def test_tied_head_trains_and_is_published_once(tmp_path: Path) -> None:
    from tests.learner.training_data import SMALL, TEXTS
    from vz_ray.needle.tiny_model import build_tiny_model

    model = build_tiny_model(tmp_path / "tied", TEXTS, config=replace(SMALL, tie_word_embeddings=True))
    data = small_training_data(model)
    trainer = Trainer(small_config(model, 0, loss=LossConfig(kl_coef=0.0)))
    first, *_, last = (trainer.sft_step(data.trajectories[:2], data.pixels)["loss"] for _ in range(4))
    assert last < first
    names = [spec.name for spec in trainer.weight_source().specs()]
    assert "model.language_model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_weight_buckets_hold_each_tensor_once_within_limit(data: TrainingData) -> None:
    source = Trainer(small_config(data.model, 0, loss=LossConfig(kl_coef=0.0))).weight_source()
    names_seen: list[str] = []
    for bucket in source.buckets(20_000):
        size = sum(tensor.numel() * tensor.element_size() for tensor in bucket.values())
        assert size <= 20_000 or len(bucket) == 1
        names_seen += bucket
    assert names_seen == [spec.name for spec in source.specs()]
    assert names_seen == list(PolicyModel.from_pretrained(data.model).hf.state_dict())


def test_weights_gather_after_a_forward_only_pass(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a complete trace, the end of a forward pass prefetches parameters for a backward pass."""
    settings = train_engine.deepspeed_config

    def with_small_limits(config: LearnerConfig, dtype: torch.dtype) -> dict[str, Any]:
        # A tiny model is below the defaults, so that all parameters stay gathered until their next use.
        limits = {"stage3_max_reuse_distance": 300, "stage3_prefetch_bucket_size": 300}
        zero = settings(config, dtype)["zero_optimization"] | limits
        return settings(config, dtype) | {"zero_optimization": zero}

    monkeypatch.setattr(train_engine, "deepspeed_config", with_small_limits)
    trainer = Trainer(small_config(data.model, 3, param_persistence_threshold=100))
    for _ in range(3):  # the third forward pass has a complete trace
        trainer.sft_step(data.trajectories[:1], data.pixels)
    expected = parameters(trainer)
    trainer.compute_logprobs(data.trajectories[:1], data.pixels)
    np.testing.assert_equal(parameters(trainer), expected)
    trainer.compute_logprobs(data.trajectories[:1], data.pixels)
    trainer.offload_states()
    np.testing.assert_equal(parameters(trainer), expected)
    trainer.load_states()
    trainer.sft_step(data.trajectories[:1], data.pixels)
    changed = parameters(trainer)
    assert any(not np.array_equal(changed[name], expected[name]) for name in expected)


def test_probe_score_matches_the_plain_hf_model(data: TrainingData) -> None:
    from vz_ray.weight_sync import build_parity_probe

    trainer = Trainer(small_config(data.model, 0, loss=LossConfig(kl_coef=0.0)))
    reference = HfReference(data.model, trainer.policy.tokens.vision)
    probe = build_parity_probe(reference.tokenizer, reference.processor.image_processor)
    expected, actual = reference.score_probe(probe), trainer.score_probe(probe)
    assert actual.num_prompt_tokens == expected.num_prompt_tokens
    assert actual.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


@pytest.mark.usefixtures("default_device")
@pytest.mark.parametrize(("stage", "offload"), [(1, "none"), (2, "optimizer"), (3, "all")])
def test_bfloat16_follows_float32(
    data: TrainingData, single_rank: tuple[dict[str, Any], Path], stage: int, offload: str
) -> None:
    trainer = Trainer(small_config(data.model, stage, dtype="bfloat16", offload=offload))
    assert {spec.dtype for spec in trainer.weight_source().specs()} == {"bfloat16"}
    metrics = trainer.sft_step(data.trajectories[:5], data.pixels)
    expected = single_rank[0]["learn"]["sft"]
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-2)
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-2)
    grpo_metrics = trainer.grpo_step(data.groups, data.pixels)
    expected = single_rank[0]["learn"]["rl"]
    assert grpo_metrics["updates"] == expected["updates"] == 2
    assert grpo_metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-2)
    assert grpo_metrics["entropy"] == pytest.approx(expected["entropy"], rel=1e-2)
    assert trainer.sft_step(data.trajectories[:5], data.pixels)["loss"] < metrics["loss"]


def test_offload_does_not_change_training(default_device: torch.device, data: TrainingData) -> None:
    """Offloading of nothing, optimizer state, or weights too gives the same steps and reference."""
    trainers = [Trainer(small_config(data.model, 3, offload=offload)) for offload in ("none", "optimizer", "all")]
    steps = [[t.sft_step(data.trajectories[:5], data.pixels), t.grpo_step(data.groups, data.pixels)] for t in trainers]
    weights = [parameters(trainer) for trainer in trainers]
    for others, values in zip(steps[1:], weights[1:], strict=True):
        for got, expected in zip(others, steps[0], strict=True):
            assert_close_metrics(got, expected)
        for name, value in weights[0].items():
            atol = 1e-6 if default_device.type == "cpu" else 1e-5
            np.testing.assert_allclose(values[name], value, atol=atol, rtol=0, err_msg=name)


def test_zero_0_refuses_bfloat16(data: TrainingData) -> None:
    with pytest.raises(ValueError, match="no float32 copy of the weights"):
        Trainer(small_config(data.model, 0, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("schedule", "warmup", "rates"),
    [
        ("constant", 0.0, {0: 1.0, 1000: 1.0}),
        ("cosine", 0.1, {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.5, 100: 0.0, 500: 0.0}),
        ("constant", 0.1, {0: 0.1, 4: 0.5, 99: 1.0}),
    ],
)
def test_learning_rate_follows_the_schedule(schedule: str, warmup: float, rates: dict[int, float]) -> None:
    config = OptimizerConfig(learning_rate=1.0, lr_schedule=schedule, warmup_ratio=warmup, total_steps=100)
    for step, rate in rates.items():
        assert learning_rate(config, step) == pytest.approx(rate, abs=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_stage": 4}, "zero_stage is 4"),
        ({"dtype": "half"}, "dtype is 'half'"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens is 0"),
        ({"offload": "optimizer", "zero_stage": 0}, "requires zero_stage 1, 2 or 3"),
        ({"offload": "all", "zero_stage": 2}, "'all' requires zero_stage 3"),
        ({"offload": True}, "offload is True; it must be"),
        ({"max_skipped_updates": 0}, "max_skipped_updates is 0"),
    ],
)
def test_config_refuses_invalid_values(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnerConfig(**change)
