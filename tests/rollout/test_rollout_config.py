"""Invalid values of rollout and weight sync configs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from vz_ray.config.learner import ENGINE_RANKS
from vz_ray.config.rollout import RESERVED_ENGINE_ARGUMENTS, EngineConfig, RolloutConfig, WeightsConfig
from vz_ray.rollout import engine_args
from vz_ray.rollout.engine_args import build_adapter_arguments, build_engine_args, check_engine_options
from vz_ray.utils.errors import UserError


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (EngineConfig, {"dtype": "int8"}, "dtype is 'int8'; it must be one of float32"),
        (EngineConfig, {"kv_cache_gib": 0.0}, "kv_cache_gib is 0.0"),
        (EngineConfig, {"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5"),
        (EngineConfig, {"tensor_parallel_size": 0}, "tensor_parallel_size is 0"),
        (EngineConfig, {"num_threads": -1}, "num_threads is -1"),
        (
            EngineConfig,
            {"options": {"max_num_seqs": 4}},
            "options has max_num_seqs, which follows rollout.max_concurrent_episodes; remove it",
        ),
        (RolloutConfig, {"num_workers": 0}, "num_workers is 0"),
        (RolloutConfig, {"cpus_per_worker": -1.0}, "cpus_per_worker is -1.0"),
        (WeightsConfig, {"transport": "pigeon"}, "transport is 'pigeon'; it must be one of shm, nccl, ipc"),
        (WeightsConfig, {"bucket_mib": 0}, "bucket_mib is 0"),
        (WeightsConfig, {"probe_tolerance": float("nan")}, "probe_tolerance is nan"),
    ],
)
def test_invalid_value_is_rejected(section: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        section(**values)


def test_unknown_engine_option_is_rejected() -> None:
    check_engine_options(EngineConfig(options={"max_num_batched_tokens": 8192}))
    with pytest.raises(UserError, match=r"vLLM \S+ does not have; use max_num_batched_tokens"):
        check_engine_options(EngineConfig(options={"max_batched_tokens": 8192}))
    with pytest.raises(UserError, match="vllm serve --help"):
        check_engine_options(EngineConfig(options={"qqqqq": 1}))


def test_reserved_arguments_exist_in_vllm() -> None:
    """A renamed argument of vLLM would silently be accepted."""
    for name in RESERVED_ENGINE_ARGUMENTS:
        check_engine_options(SimpleNamespace(options={name: None}))


def test_adapter_ranks_are_those_of_vllm() -> None:
    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == ENGINE_RANKS


def test_float32_adapters_on_gpus_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = EngineConfig(adapter_rank=8, adapter_targets=["q_proj"])
    with pytest.raises(UserError, match=r"engine\.dtype is 'float32'; .* learner\.lora\.publish=merged"):
        build_adapter_arguments(Path("assets/tiny-base"), config)
    arguments, layers = build_adapter_arguments(Path("assets/tiny-base"), replace(config, dtype="bfloat16"))
    assert (arguments["max_lora_rank"], arguments["lora_target_modules"]) == (8, ["q_proj"])
    assert all(layer.endswith("self_attn.q_proj") for layer in layers)


def test_engine_options_are_passed_to_vllm(tmp_path: Path) -> None:
    options = {"max_num_batched_tokens": 2048, "block_size": 16, "seed": 5}
    args = build_engine_args(Path("assets/tiny-base"), EngineConfig(options=options), [1], tmp_path / "log", "shm")
    assert (args.max_num_batched_tokens, args.block_size, args.seed) == (2048, 16, 5)
    assert args.logprobs_mode == "processed_logprobs"


@pytest.mark.parametrize(("in_actor", "method"), [(False, "spawn"), (True, None)])
def test_gpu_engine_outside_ray_spawns_its_processes(
    monkeypatch: pytest.MonkeyPatch, in_actor: bool, method: str | None
) -> None:
    variable = "VLLM_WORKER_MULTIPROC_METHOD"
    monkeypatch.setattr(os, "environ", {key: value for key, value in os.environ.items() if key != variable})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(engine_args, "_in_ray_actor", lambda: in_actor)
    engine_args.prepare_environment(EngineConfig())
    assert os.environ.get(variable) == method


@pytest.mark.parametrize(("kv_cache_gib", "utilization"), [(None, 0.85), (4.0, 0.01)])
def test_utilization_applies_only_without_a_fixed_kv_cache(
    tmp_path: Path, kv_cache_gib: float | None, utilization: float
) -> None:
    """vLLM refuses to start if less than this fraction of the GPU is free."""
    config = EngineConfig(kv_cache_gib=kv_cache_gib)
    args = build_engine_args(Path("assets/tiny-base"), config, [1], tmp_path / "log", "shm")
    assert args.gpu_memory_utilization == utilization
    assert args.kv_cache_memory_bytes == (None if kv_cache_gib is None else 4 << 30)
