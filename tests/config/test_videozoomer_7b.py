"""The 7B recipes load, fit the 7B model, and are consistent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.config.qwen_7b import PARAMETERS, TEXT, VISION, VISION_PARAMETERS, on_meta
from vz_ray.config import load_config
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.sft import SftRunConfig

SFT, RL = Path("conf/videozoomer-7b-sft.yaml"), Path("conf/videozoomer-7b-rl.yaml")
RECIPES = [*Path("conf").glob("videozoomer-7b-*.yaml"), *Path("conf").glob("qwen3*.yaml")]
GPU_BYTES = 80e9
TRAINED, FROZEN, SAMPLED = 2 + 2 + 3 * 4, 2, 2
"""Bytes per parameter: bf16 weight and gradient, fp32 weight and two moments; or only the bf16 weight."""


@pytest.fixture(scope="module")
def sft() -> SftRunConfig:
    return load_config(SftRunConfig, SFT)


@pytest.fixture(scope="module")
def rl() -> GrpoRunConfig:
    return load_config(GrpoRunConfig, RL)


@pytest.fixture(scope="module")
def model() -> Any:
    return on_meta()


def count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def visual_tokens(episode: EpisodeConfig) -> int:
    """Return the visual tokens of a frame of maximum size."""
    return episode.max_pixels // (VISION["patch_size"] * VISION["spatial_merge_size"]) ** 2


def test_meta_model_has_released_parameter_count(model: Any) -> None:
    assert count(model) == PARAMETERS
    assert count(model.model.visual) == VISION_PARAMETERS
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_both_stages_have_equal_episode_config(sft: SftRunConfig, rl: GrpoRunConfig) -> None:
    assert sft.episode == rl.episode


def test_every_value_names_its_source() -> None:
    for file in RECIPES:
        for line in file.read_text().splitlines():
            if re.match(r"\s+\w+: +\S", line) and not re.search(r"# (paper|code|ours|as )", line):
                raise AssertionError(f"{file}: no source in {line!r}")


def test_frames_fit_max_images_and_context(rl: GrpoRunConfig) -> None:
    episode = rl.episode
    frames = episode.overview_frames + (episode.max_rounds - 1) * episode.max_zoom_frames
    assert frames <= episode.max_images
    assert visual_tokens(episode) == 128
    # The context also holds three turns of maximum length.
    assert frames * visual_tokens(episode) + 3 * episode.max_turn_tokens < episode.max_context
    assert episode.max_context <= TEXT["max_position_embeddings"]


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_longest_episode_fits_micro_batch(stage: str, request: pytest.FixtureRequest) -> None:
    config = request.getfixturevalue(stage)
    assert config.episode.max_context <= config.learner.micro_batch_tokens


def test_batches_divide_evenly(sft: SftRunConfig, rl: GrpoRunConfig) -> None:
    assert rl.train.batch_size % rl.learner.mini_batch_size == 0
    assert rl.learner.mini_batch_size * rl.train.group_size % rl.learner.world_size == 0
    assert sft.sft.batch_size % sft.learner.world_size == 0
    assert abs(sft.sft.max_steps * sft.sft.batch_size - 11_000) < sft.sft.batch_size
    assert abs(rl.train.max_steps * rl.train.batch_size - 52_000) < rl.train.batch_size
    assert rl.rollout.engine.max_num_seqs >= rl.rollout.max_concurrent_episodes


def test_attention_heads_divide_over_engine_gpus(rl: GrpoRunConfig) -> None:
    parallel = rl.rollout.engine.tensor_parallel_size
    assert TEXT["num_attention_heads"] % parallel == TEXT["num_key_value_heads"] % parallel == 0


def state_bytes(learner: LearnerConfig, model: Any, *, reference: bool) -> float:
    """Return the bytes of model and optimizer state on one rank under ZeRO 3."""
    vision = count(model.model.visual)
    frozen = vision if learner.freeze_vision else 0
    trained = count(model) - frozen
    kept = trained * TRAINED + frozen * FROZEN + (count(model) * FROZEN if reference else 0)
    return kept / learner.world_size


def test_model_state_leaves_most_memory_to_activations(sft: SftRunConfig, rl: GrpoRunConfig, model: Any) -> None:
    assert sft.learner.zero_stage == rl.learner.zero_stage == 3
    assert state_bytes(sft.learner, model, reference=False) < GPU_BYTES / 3
    assert state_bytes(rl.learner, model, reference=rl.learner.loss.kl_coef > 0) < GPU_BYTES / 3


def test_kv_cache_holds_longest_episodes(rl: GrpoRunConfig, model: Any) -> None:
    engine = rl.rollout.engine
    assert engine.kv_cache_gib is None
    weights = count(model) * SAMPLED / engine.tensor_parallel_size
    head = TEXT["hidden_size"] // TEXT["num_attention_heads"]
    per_token = 2 * TEXT["num_hidden_layers"] * TEXT["num_key_value_heads"] * head * SAMPLED
    room = engine.gpu_memory_utilization * GPU_BYTES - weights
    # The samples of a task share their prompt, so more episodes fit.
    assert room / (per_token * rl.episode.max_context) > rl.train.group_size


def test_values_of_the_paper(sft: SftRunConfig, rl: GrpoRunConfig) -> None:
    optimizer, loss = rl.learner.optimizer, rl.learner.loss
    assert (optimizer.learning_rate, optimizer.lr_schedule) == (1e-6, "constant")
    assert (loss.clip_ratio_low, loss.clip_ratio_high, loss.kl_coef, loss.entropy_coef) == (
        0.2,
        0.27,
        0.001,
        0.001,
    )
    assert (rl.train.batch_size, rl.train.group_size, rl.learner.mini_batch_size) == (128, 16, 32)
    assert not rl.learner.freeze_vision
    assert (sft.learner.optimizer.learning_rate, sft.learner.optimizer.warmup_ratio) == (5e-6, 0.1)
    assert (sft.sft.lr_schedule, sft.learner.freeze_vision) == ("cosine", True)
