"""Environment variables and engine arguments for vLLM."""

from __future__ import annotations

import atexit
import difflib
import functools
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

from vz_ray.config.learner import match_layers
from vz_ray.config.rollout import EngineConfig
from vz_ray.families import FAMILIES, load_model_shape
from vz_ray.utils.errors import UserError
from vz_ray.utils.temp_dir import temp_dir
from vz_ray.weight_sync.backends import ENGINE_ENV_VAR

_GIB = 1 << 30

# Block size of the prefix cache on CPU, in tokens. vLLM's default of 128 is longer than a turn of a
# small model. Two-turn episodes of 400 tokens are 1.4 times faster with 32.
_CPU_BLOCK_SIZE = 32

# On a GPU, vLLM refuses to start if less than this fraction is free, even if the size of the KV cache is given. A
# learner or another engine on the same GPU then need not leave the fraction that a single engine would take.
_NO_MINIMUM = 0.01


def prepare_environment(config: EngineConfig) -> None:
    """Set the environment variables of this process and its engine child processes.

    Call it before vLLM is imported.
    """
    os.environ[ENGINE_ENV_VAR] = "1"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_DO_NOT_TRACK", "1")
    os.environ.setdefault("VLLM_RPC_BASE_PATH", str(_socket_dir()))
    import torch

    if torch.cuda.is_available():
        # The check has initialized the driver, so a forked process could not use CUDA. Within a Ray actor vLLM
        # spawns by itself, and passes the cluster's address on.
        if not _in_ray_actor():
            os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        return
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # oneDNN caches one compiled kernel (0.3 MB) per input shape, and shapes vary from turn to turn.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    # Spinning threads starve decoders and the learner on the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if config.num_threads:
        os.environ["OMP_NUM_THREADS"] = str(config.num_threads)


def _in_ray_actor() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


@functools.cache
def _socket_dir() -> Path:
    """Create the socket directory of this process's engines; it is deleted at exit."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(temp_dir("vz_ray_engine_"))


def _write_logging_config(file: Path) -> str:
    """Write a logging config that sends vLLM's log to `file`. Return the path of the config."""
    handler = {"class": "logging.FileHandler", "filename": str(file), "formatter": "plain"}
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"}},
        "handlers": {"file": handler},
        "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    path = file.with_suffix(".logging.json")
    path.write_text(json.dumps(config))
    return str(path)


def build_engine_args(
    model: Path,
    config: EngineConfig,
    banned_token_ids: Sequence[int],
    log_file: Path,
    backend: str,
    extra_logits_processors: Sequence[type] = (),
    *,
    can_sleep: bool = False,
) -> Any:
    """Build vLLM's `AsyncEngineArgs`.

    Args:
        model: Checkpoint directory.
        config: Engine settings.
        banned_token_ids: Token ids that are never sampled.
        log_file: vLLM's log file.
        backend: vLLM weight transfer backend.
        extra_logits_processors: Run after `TokenMask`.
        can_sleep: Allocate weights and KV cache so that sleep can free them; vLLM on CPU cannot.
    """
    import torch
    from vllm.config import WeightTransferConfig
    from vllm.config.logging import LoggingConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    from vz_ray.rollout.token_mask import BANNED_TOKENS_KEY, TokenMask
    from vz_ray.weight_sync.vllm_adapter import ADAPTED_LAYERS_KEY

    # On CPU, vLLM accepts the uniprocess executor only as a class. Its separate process serves to bind
    # threads to cores, which is disabled here. One process less starts a third faster.
    single_process = config.tensor_parallel_size == 1 and not torch.cuda.is_available()
    check_engine_options(config)
    adapter_arguments, adapted_layers = build_adapter_arguments(model, config)
    arguments: dict[str, Any] = {
        "model": str(model),
        "distributed_executor_backend": UniProcExecutor if single_process else None,
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "enforce_eager": config.enforce_eager,
        "tensor_parallel_size": config.tensor_parallel_size,
        "kv_cache_memory_bytes": None if config.kv_cache_gib is None else int(config.kv_cache_gib * _GIB),
        "gpu_memory_utilization": config.gpu_memory_utilization if config.kv_cache_gib is None else _NO_MINIMUM,
        "limit_mm_per_prompt": {"image": config.images_per_prompt, "video": 0},
        "mm_processor_cache_gb": config.mm_processor_cache_gib,
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "enable_sleep_mode": can_sleep and torch.cuda.is_available(),
        "block_size": None if torch.cuda.is_available() else _CPU_BLOCK_SIZE,
        "trust_remote_code": False,
        "weight_transfer_config": WeightTransferConfig(backend=backend),
        "logits_processors": [TokenMask, *extra_logits_processors],
        "additional_config": {BANNED_TOKENS_KEY: list(banned_token_ids), ADAPTED_LAYERS_KEY: adapted_layers},
        "logging_config": LoggingConfig(pylogging_config_file=_write_logging_config(log_file)),
        "disable_log_stats": True,
    }
    return AsyncEngineArgs(**(arguments | config.options | adapter_arguments))


def build_adapter_arguments(model: Path, config: EngineConfig) -> tuple[dict[str, Any], list[str]]:
    """Return vLLM's arguments for published adapters and the HF names of the adapted layers; empty without adapters.

    Raises:
        UserError: vLLM's kernels do not support the engine's dtype, or a target matches no layer.
    """
    if not config.adapter_rank:
        return {}, []
    import torch

    from vz_ray.weight_sync.vllm_adapter import AdapterWorker

    if config.dtype == "float32" and torch.cuda.is_available():
        raise UserError(
            "rollout.engine.dtype is 'float32'; vLLM's adapters on GPUs require bfloat16 or float16. Change it, or "
            "set learner.lora.publish=merged"
        )
    shape = load_model_shape(str(model))
    linear_layers = [name for name, _ in FAMILIES[shape.model_type].linear_layers(shape)]
    layers = match_layers(config.adapter_targets, linear_layers)
    arguments = {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": config.adapter_rank,
        # Other layers would compute with zeros.
        "lora_target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "worker_extension_cls": f"{AdapterWorker.__module__}.{AdapterWorker.__qualname__}",
    }
    return arguments, layers


def check_engine_options(config: EngineConfig) -> None:
    """Check that every option is an argument of the installed vLLM. Imports vLLM if there are options.

    Raises:
        UserError: vLLM has no such argument.
    """
    if not config.options:
        return
    from vllm import __version__
    from vllm.engine.arg_utils import AsyncEngineArgs

    names = [item.name for item in fields(AsyncEngineArgs)]
    for name in config.options:
        if name not in names:
            similar = difflib.get_close_matches(name, names, n=1)
            hint = f"use {similar[0]}" if similar else "see the options of `vllm serve --help`, with underscores"
            raise UserError(f"engine.options has {name}, which vLLM {__version__} does not have; {hint}")
