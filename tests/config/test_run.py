"""Combinations of values that a run rejects."""

from __future__ import annotations

import pytest

from vz_ray.config import load_config
from vz_ray.config.load import ConfigError
from vz_ray.config.quickstart import QuickstartConfig
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.sft import SftRunConfig


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.batch_size=10", "learner.mini_batch_size=4"],
            r"train\.batch_size is 10; it must be a multiple of learner\.mini_batch_size \(4\).*8 or 12",
        ),
        (["timeouts.score_s=900"], r"timeouts\.score_s is 900; it must be at most twice turn_s \(300\)"),
        (["timeouts.judge_s=300"], r"timeouts\.score_s is 300; it must be above judge_s \(300\)"),
        (["timeouts.turn_s=0"], r"timeouts\.turn_s is 0.0; it must be finite and above 0"),
        (["rollout.turn_timeout_s=9"], r"rollout\.turn_timeout_s follows timeouts\.turn_s; set that instead"),
        (
            ["learner.micro_batch_tokens=4096", "episode.max_context=8192"],
            r"micro_batch_tokens is 4096; it must be at least episode\.max_context \(8192\)",
        ),
    ],
)
def test_batch_that_does_not_divide_or_fit_is_rejected(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(GrpoRunConfig, None, overrides)


def test_batch_smaller_than_mini_batch_is_accepted() -> None:
    assert load_config(GrpoRunConfig, None, ["train.batch_size=3", "learner.mini_batch_size=8"]).train.batch_size == 3


def test_sft_run_checks_micro_batch_tokens() -> None:
    with pytest.raises(ConfigError, match=r"at least episode\.max_context \(32768\)"):
        load_config(SftRunConfig, None, ["learner.micro_batch_tokens=1000"])


def test_sections_follow_timeouts_and_episode() -> None:
    overrides = ["timeouts.turn_s=400", "episode.max_context=1000", "rollout.max_concurrent_episodes=7"]
    config = load_config(GrpoRunConfig, None, [*overrides, "model=checkpoint", "episode.max_zoom_frames=3"])
    assert config.rollout.turn_timeout_s == 400
    assert (config.rollout.engine.max_model_len, config.rollout.engine.max_num_seqs) == (1000, 7)
    assert config.rollout.engine.images_per_prompt == config.episode.max_images
    assert config.reward.max_zoom_frames == 3
    assert config.learner.model == "checkpoint"


def test_frame_cache_holds_a_steps_largest_frames() -> None:
    episode = ["episode.overview_frames=10", "episode.max_images=14", "episode.max_pixels=1048576"]
    batch = ["train.batch_size=8", "train.group_size=3", "learner.world_size=2", "learner.mini_batch_size=8"]
    run = load_config(GrpoRunConfig, None, [*episode, *batch])
    assert run.learner.frame_cache_bytes == 8 * (10 + 3 * 4) * 3 // 2 << 20
    sft = load_config(SftRunConfig, None, [*episode, "sft.batch_size=5", "learner.world_size=4"])
    assert sft.learner.frame_cache_bytes == 53 << 20  # 5 * 14 * 3 MiB / 4 ranks, rounded up
    large = load_config(GrpoRunConfig, None, [*episode, *batch, "train.group_size=300"])
    assert large.learner.frame_cache_bytes == 8 << 30
    limited = load_config(GrpoRunConfig, None, [*episode, *batch, "learner.frame_cache_mib=7"])
    assert limited.learner.frame_cache_bytes == 7 << 20


@pytest.mark.parametrize("cause", ["train.colocate=true", "weights.transport=ipc"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.engine.tensor_parallel_size=2", r"tensor_parallel_size is 2; with .* it must be 1"),
        ("rollout.max_workers=3", r"rollout\.max_workers is 3; with .* as many as the GPUs\. Use 0"),
        ("learner.world_size=2", r"num_workers is 1 and learner\.world_size is 2; .* Use 2 for both"),
        ("rollout.node_group=rollout", r"rollout\.node_group is 'rollout' and learner\.node_group is ''"),
    ],
)
def test_shared_gpus_need_one_rank_and_one_worker_each(cause: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(GrpoRunConfig, None, [cause, "learner.world_size=1", override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["weights.transport=nccl"], r"weights\.transport is 'nccl'; with train\.colocate it must be 'ipc'"),
        (
            ["train.max_staleness=1", "learner.loss.tis_cap=2.0"],
            r"train\.max_staleness is 1; with train\.colocate it must be 0",
        ),
    ],
)
def test_colocated_run_rejects_nccl_and_staleness(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(GrpoRunConfig, None, ["train.colocate=true", *overrides])


def test_colocated_ranks_and_engines_request_half_a_gpu() -> None:
    overrides = ["train.colocate=true", "learner.world_size=4", "rollout.num_workers=4"]
    config = load_config(GrpoRunConfig, None, [*overrides, "learner.node_group=gpu", "rollout.node_group=gpu"])
    assert (config.shares_gpus, config.gpu_share) == (True, 0.5)
    assert load_config(GrpoRunConfig, None, []).gpu_share == 1.0


def test_quickstart_rejects_colocation() -> None:
    with pytest.raises(ConfigError, match=r"train\.colocate is true; the quickstart .* must be false"):
        load_config(QuickstartConfig, "conf/quickstart.yaml", ["train.colocate=true"])


@pytest.mark.parametrize(
    ("overrides", "rank"),
    [
        ([], 0),
        (["rank=33"], 64),
        (["rank=512", "publish=adapters"], 512),
        (["rank=16", "publish=merged"], 0),
        (["rank=513"], 0),
        (["rank=16", "train_merger=true"], 0),
        (["rank=16", "target_modules=[q_proj]"], 0),
        (["rank=16", "target_modules=[q_proj]", "publish=adapters"], 16),
    ],
)
def test_adapters_are_published_if_engines_support_them(overrides: list[str], rank: int) -> None:
    overrides = [f"learner.lora.{override}" for override in overrides]
    config = load_config(GrpoRunConfig, None, ["train.colocate=true", *overrides])
    assert config.rollout.engine.adapter_rank == rank
    assert config.learner.lora.publishes_adapters == (rank > 0)
    assert config.sleep_level == (1 if rank else 2)
    assert config.rollout.engine.adapter_targets == config.learner.lora.target_modules


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rank=0"], r"learner\.lora\.publish is 'adapters' and rank is 0"),
        (["rank=513"], r"learner\.lora\.rank is 513; published adapters have at most 512\. Set publish=merged"),
        (["rank=16", "train_merger=true"], r"learner\.lora\.train_merger is true; .* Set publish=merged"),
    ],
)
def test_adapters_that_engines_do_not_support_are_rejected(overrides: list[str], message: str) -> None:
    settings = [f"learner.lora.{override}" for override in ("publish=adapters", *overrides)]
    with pytest.raises(ConfigError, match=message):
        load_config(GrpoRunConfig, None, settings)


def test_adapters_require_engines_that_keep_their_weights() -> None:
    settings = ["learner.lora.rank=16", "train.colocate=true", "train.sleep_level=2"]
    with pytest.raises(ConfigError, match=r"train\.sleep_level is 2, .* Use 1, or learner\.lora\.publish=merged"):
        load_config(GrpoRunConfig, None, settings)
    assert load_config(GrpoRunConfig, None, [*settings, "learner.lora.publish=merged"]).sleep_level == 2


def test_quickstart_publishes_merged_weights() -> None:
    settings = ["learner.lora.rank=16"]
    config = load_config(QuickstartConfig, "conf/quickstart.yaml", settings)
    assert (config.rollout.engine.adapter_rank, config.learner.lora.publishes_adapters) == (0, False)
    with pytest.raises(ConfigError, match=r"publish is 'adapters'; .* which requires 'merged'"):
        load_config(QuickstartConfig, "conf/quickstart.yaml", [*settings, "learner.lora.publish=adapters"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learner.loss.turn_credit=shaped"], r"learner\.loss\.turn_credit is 'shaped' and all weights .* are 0"),
        (
            ["reward.turns.new_time=0.2"],
            r"reward\.turns\.new_time is 0\.2 and learner\.loss\.turn_credit is 'none'; .* shaped or returns",
        ),
        (["learner.loss.rejection=icepop"], r"learner\.loss\.rejection is 'icepop'; it must be one of none, token"),
        (["learner.loss.rejection_low=0.5"], r"learner\.loss\.rejection_low is 0\.5 and rejection is 'none'"),
        (
            ["learner.loss.frame_tie_break=0.1"],
            r"learner\.loss\.frame_tie_break is 0\.1; .* reward\.format \(0\.1\), or the number of frames outweighs it",
        ),
        (["train.min_overview_frames=65"], r"train\.min_overview_frames is 65; .* episode\.overview_frames \(64\)"),
        (["train.max_skip_rate=1"], r"train\.max_skip_rate is 1\.0; it must be between 0 and 0\.95"),
        (["learner.old_logprobs=engine", "learner.loss.tis_cap=2"], r"learner\.old_logprobs is 'engine', so that"),
    ],
)
def test_loss_keys_without_effect_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(GrpoRunConfig, None, overrides)
    load_config(GrpoRunConfig, None, ["learner.loss.turn_credit=returns", "reward.turns.valid_zoom=0.1"])
    load_config(GrpoRunConfig, None, ["learner.loss.frame_tie_break=0.1", "reward.format=0", "reward.tool=0"])
