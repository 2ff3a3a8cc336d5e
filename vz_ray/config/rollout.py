"""Config of the rollout workers, their vLLM engines, and weight publishes to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vz_ray.config.fields import InvalidValueError, Section, check_at_least, choice, derived, number
from vz_ray.config.timeouts import timeout

RESERVED_ENGINE_ARGUMENTS = {
    "model": "follows the model of the run",
    "tokenizer": "follows the model of the run",
    "dtype": "has its own key: engine.dtype",
    "max_model_len": "follows episode.max_context",
    "max_num_seqs": "follows rollout.max_concurrent_episodes",
    "limit_mm_per_prompt": "follows episode.max_images",
    "kv_cache_memory_bytes": "follows engine.kv_cache_gib",
    "gpu_memory_utilization": "has its own key: engine.gpu_memory_utilization",
    "mm_processor_cache_gb": "follows engine.mm_processor_cache_gib",
    "tensor_parallel_size": "has its own key: engine.tensor_parallel_size",
    "enforce_eager": "has its own key: engine.enforce_eager",
    "logprobs_mode": "must be processed_logprobs, which the learner recomputes",
    "enable_sleep_mode": "follows train.colocate",
    "enable_cumem_allocator": "follows train.colocate",
    "speculative_config": "has a draft model, whose weights no publish updates",
    "enable_prefix_caching": "is always on: episodes share prefixes",
    "weight_transfer_config": "follows weights.transport",
    "enable_lora": "follows learner.lora.publish",
    "max_loras": "is always 1: all turns use the policy's adapter",
    "max_lora_rank": "follows learner.lora.rank",
    "lora_target_modules": "follows learner.lora.target_modules",
    "distributed_executor_backend": "follows the machine",
    "logits_processors": "bans vision tokens",
    "additional_config": "has the banned tokens",
    "logging_config": "follows log_dir",
    "disable_log_stats": "is set for the metrics of vz_ray",
    "trust_remote_code": "is always off: checkpoints are data",
    "skip_tokenizer_init": "is always off: stop strings need the tokenizer",
}
"""Arguments of vLLM that vz_ray sets itself, with what they follow."""


@dataclass
class EngineConfig(Section):
    """Arguments of a vLLM engine."""

    dtype: str = choice("float32", "bfloat16", "float16")
    """`float32` on CPU (log-probs equal the learner's), `bfloat16` on GPUs."""
    kv_cache_gib: float | None = number(1.0, above=0)
    """KV cache in GiB; null uses `gpu_memory_utilization` of the GPU."""
    gpu_memory_utilization: float = number(0.85, above=0, maximum=1)
    """Fraction of a GPU's memory for the engine if `kv_cache_gib` is null."""
    mm_processor_cache_gib: float = number(0.5, minimum=0)
    """Cache of preprocessed frames in GiB, shared by the samples of a group and by later turns (about 2.4 MB
    per 128 visual tokens)."""
    max_model_len: int = derived(32768, "episode.max_context")
    """Maximum tokens of a conversation, including visual tokens."""
    max_num_seqs: int = derived(
        16, "max_num_seqs", "rollout.max_concurrent_episodes (of a server: max_ongoing_requests)"
    )
    """Maximum turns in one batch."""
    images_per_prompt: int = derived(128, "images_per_prompt", "episode.max_images")
    """Maximum frames of a conversation."""
    adapter_rank: int = derived(0, "adapter_rank", "learner.lora.rank")
    """Rank for which the engine allocates the adapters that it receives; 0 if it receives all weights."""
    adapter_targets: Sequence[str] = derived((), "learner.lora.target_modules")
    """Layers with an adapter, as in `LoraConfig.target_modules`."""
    tensor_parallel_size: int = number(1, minimum=1)
    """GPUs per engine."""
    num_threads: int = number(0, minimum=0)
    """CPU threads of an engine on CPU; 0 uses the environment's default."""
    enforce_eager: bool = True
    """Disable CUDA graphs: a faster start. Required on CPU."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's `AsyncEngineArgs`, such as `max_num_batched_tokens: 16384`; those that follow
    other keys are refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.options:
            if source := RESERVED_ENGINE_ARGUMENTS.get(name):
                raise InvalidValueError("options", f"has {name}, which {source}; remove it")


@dataclass
class RolloutConfig(Section):
    """Number, concurrency and placement of the rollout workers."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    """The vLLM engine of each worker."""
    num_workers: int = 1
    """Workers; with `max_workers` the minimum, and 0 then stops every idle worker."""
    max_workers: int = 0
    """Maximum workers, started while episodes queue, so that Ray's autoscaler adds nodes; 0 keeps
    `num_workers`."""
    upscale_delay_s: float = number(10.0, minimum=0)
    """Seconds that episodes must queue before workers are started."""
    downscale_delay_s: float = number(120.0, minimum=0)
    """Seconds that a worker must be unneeded before it is stopped."""
    max_concurrent_episodes: int = number(32, minimum=1)
    """Maximum concurrent episodes per worker."""
    cpus_per_worker: float = number(1.0, minimum=0)
    """CPUs that Ray reserves per worker."""
    node_group: str = ""
    """Ray resource of the nodes for the workers; empty allows every node."""
    max_attempts: int = number(3, minimum=1)
    """Maximum attempts at an episode; the episodes of a dead worker are retried on another one."""
    start_timeout_s: float = timeout("engine_start_s")
    """Timeout of an engine's start."""
    no_worker_timeout_s: float = timeout("no_workers_s")
    """Maximum time without any worker; the run then stops and can be resumed."""
    turn_timeout_s: float = timeout("turn_s")
    """Timeout of one generated turn."""
    episode_timeout_s: float = timeout("episode_s")
    """Timeout of one episode."""
    health_check_interval_s: float = number(10.0, above=0)
    """Seconds between health checks of idle workers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_workers < (0 if self.max_workers else 1):
            raise InvalidValueError(
                "num_workers",
                f"is {self.num_workers}; it must be at least 1, or at least 0 with max_workers",
                "max_workers",
            )
        if self.max_workers:
            check_at_least(self, "max_workers", "num_workers", ", or 0 for a fixed number")

    @property
    def worker_limit(self) -> int:
        """Maximum number of workers."""
        return self.max_workers or self.num_workers


@dataclass
class WeightsConfig(Section):
    """Transport and verification of weight publishes."""

    transport: str = choice("shm", "nccl", "ipc")
    """`shm`: shared memory of each node, on CPU or GPU; `nccl`: broadcast between GPUs; `ipc`: each learner
    rank hands its GPU's memory to the engine on the same GPU."""
    keep_shm_copy: bool = True
    """With `nccl` and `ipc`, also write each version to shared memory, after it was delivered. Workers that start
    between publishes, or on spot nodes, load it from there."""
    shm_dir: str | None = None
    """Directory of versions in shared memory; default: a directory of the run in /dev/shm."""
    bucket_mib: int = number(256, minimum=1)
    """Maximum size of one file, or of one gather of a sharded model, in MiB."""
    probe_every: int = number(1, minimum=1)
    """Publishes between parity probes, which compare log-probs of engine and learner on a fixed prompt. The first
    publish is always probed."""
    probe_tolerance: float | None = number(None, above=0)
    """Maximum mean log-prob gap of the parity probe. Default: 1e-4 in float32, 0.05 in float16, 0.15 in bfloat16. The
    first publish lowers it to five times its own gap, but not below 1e-4, 0.005 and 0.03."""
    timeout_s: float = timeout("publish_s")
    """Timeout of each phase of a publish, per worker."""
