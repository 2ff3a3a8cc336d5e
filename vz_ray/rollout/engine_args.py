"""How an engine is started: what vLLM reads from the environment, and its arguments."""

from __future__ import annotations

import atexit
import functools
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vz_ray.config.rollout import EngineConfig
from vz_ray.utils.temp_dir import temp_dir

_GIB = 1 << 30

# Tokens in a block of the prefix cache on CPU. vLLM's default of 128 is longer
# than a turn of a small model; two-turn episodes of 400 tokens are 1.4 times faster with 32.
_CPU_BLOCK_SIZE = 32


def prepare_environment(config: EngineConfig) -> None:
    """Sets what vLLM reads from the environment; must run before vLLM is imported."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_DO_NOT_TRACK", "1")
    os.environ.setdefault("VLLM_RPC_BASE_PATH", str(_socket_dir()))
    import torch

    if torch.cuda.is_available():
        return
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # oneDNN keeps what it compiled for each shape, 0.3 MB each, and every turn has a shape of its own.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    # Threads that spin while they wait starve decoders and learner on the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if config.num_threads:
        os.environ["OMP_NUM_THREADS"] = str(config.num_threads)


@functools.cache
def _socket_dir() -> Path:
    """Where this process's engines have their sockets; it goes with the process, or with a later one."""
    kept = ExitStack()
    atexit.register(kept.close)
    return kept.enter_context(temp_dir("vz_ray_engine_"))


def _write_logging_config(file: Path) -> str:
    """Writes a logging configuration that sends vLLM's log to `file`; returns its path."""
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
) -> Any:
    """vLLM's `AsyncEngineArgs` for the checkpoint directory `model`; its log goes to `log_file`."""
    import torch
    from vllm.config import WeightTransferConfig
    from vllm.config.logging import LoggingConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    from vz_ray.rollout.token_mask import BANNED_TOKENS_KEY, TokenMask

    # By name vLLM refuses it on CPU, where a process of its own lets it bind threads to cores; none are bound
    # here, and one process less starts a third faster and saves a message in each step.
    alone = config.tensor_parallel_size == 1 and not torch.cuda.is_available()
    return AsyncEngineArgs(
        model=str(model),
        distributed_executor_backend=UniProcExecutor if alone else None,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        enforce_eager=config.enforce_eager,
        tensor_parallel_size=config.tensor_parallel_size,
        kv_cache_memory_bytes=None if config.kv_cache_gib is None else int(config.kv_cache_gib * _GIB),
        gpu_memory_utilization=config.gpu_memory_utilization,
        limit_mm_per_prompt={"image": config.images_per_prompt, "video": 0},
        mm_processor_cache_gb=config.mm_processor_cache_gib,
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=True,
        block_size=None if torch.cuda.is_available() else _CPU_BLOCK_SIZE,
        trust_remote_code=False,
        weight_transfer_config=WeightTransferConfig(backend=backend),
        logits_processors=[TokenMask, *extra_logits_processors],
        additional_config={BANNED_TOKENS_KEY: list(banned_token_ids)},
        logging_config=LoggingConfig(pylogging_config_file=_write_logging_config(log_file)),
        disable_log_stats=True,
    )
