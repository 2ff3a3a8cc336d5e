"""Config of the rollout workers: their engines, their deadlines, how many there are."""

from __future__ import annotations

from dataclasses import dataclass, field

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class EngineConfig:
    """What vLLM is started with.

    Attributes:
        dtype: `float32` on CPU (log-probs equal the learner's), `bfloat16` on GPUs.
        kv_cache_gib: GiB of key/value cache; null takes `gpu_memory_utilization` of the device instead.
        gpu_memory_utilization: Fraction of a GPU's memory that the engine may use, if `kv_cache_gib` is null.
        mm_processor_cache_gib: GiB for preprocessed frames, so that those of a group's other samples
            and of earlier turns are not sent again (about 2.4 MB for 128 visual tokens).
        max_model_len: Most tokens in a conversation, visual tokens included.
        max_num_seqs: Most turns that are sampled at once.
        images_per_prompt: Most frames in a conversation.
        tensor_parallel_size: GPUs per engine.
        num_threads: CPU threads of an engine on CPU; 0 leaves it to the environment.
        enforce_eager: No graph capture; starts faster, and is the only way on CPU.
    """

    dtype: str = "float32"
    kv_cache_gib: float | None = 1.0
    gpu_memory_utilization: float = 0.85
    mm_processor_cache_gib: float = 0.5
    max_model_len: int = 32768
    max_num_seqs: int = 16
    images_per_prompt: int = 128
    tensor_parallel_size: int = 1
    num_threads: int = 0
    enforce_eager: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"engine.dtype={self.dtype!r}: use one of {', '.join(_DTYPES)}")
        if self.kv_cache_gib is not None and self.kv_cache_gib <= 0:
            raise ValueError(f"engine.kv_cache_gib={self.kv_cache_gib}: must be positive or null")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"engine.gpu_memory_utilization={self.gpu_memory_utilization}: must be in (0, 1]"
            )
        for name in ("max_model_len", "max_num_seqs", "images_per_prompt", "tensor_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"engine.{name}={getattr(self, name)}: must be at least 1")
        if self.num_threads < 0:
            raise ValueError(f"engine.num_threads={self.num_threads}: must be 0 or more")


@dataclass
class RolloutConfig:
    """The fleet of rollout workers.

    Attributes:
        engine: What each worker's engine is started with.
        num_workers: How many workers there are; the fewest where there may be more, 0 lets all go
            when there is nothing to play.
        max_workers: Most workers: further ones are started while episodes wait for a place, which makes
            Ray's autoscaler look for nodes; 0 keeps them at `num_workers`.
        upscale_delay_s: Seconds that episodes must have waited before workers are started.
        downscale_delay_s: Seconds that a worker must have been too many before it is let go.
        max_concurrent_episodes: Most episodes that one worker plays at once.
        cpus_per_worker: Logical CPUs that Ray reserves for a worker.
        node_group: Workers are placed on nodes that have a Ray resource of this name; empty allows all.
        max_attempts: Most times that an episode is played before it is given up
            (a worker that dies takes its episodes with it; they are played again).
        start_timeout_s: Seconds in which an engine must have started.
        no_worker_timeout_s: Seconds that episodes may wait while there is no worker at all, such as when every
            node was taken away; the run stops then, and can be resumed.
        turn_timeout_s: Seconds in which a turn must have been sampled.
        episode_timeout_s: Seconds in which an episode must have been played.
        health_check_interval_s: Seconds between looks at workers that nobody asks anything of.
    """

    engine: EngineConfig = field(default_factory=EngineConfig)
    num_workers: int = 1
    max_workers: int = 0
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 120.0
    max_concurrent_episodes: int = 32
    cpus_per_worker: float = 1.0
    node_group: str = ""
    max_attempts: int = 3
    start_timeout_s: float = 600.0
    no_worker_timeout_s: float = 3600.0
    turn_timeout_s: float = 300.0
    episode_timeout_s: float = 1200.0
    health_check_interval_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("max_concurrent_episodes", "max_attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name}={getattr(self, name)}: must be at least 1")
        if self.num_workers < (0 if self.max_workers else 1):
            raise ValueError(
                f"rollout.num_workers={self.num_workers}: must be at least 1, or 0 with rollout.max_workers"
            )
        if self.max_workers and self.max_workers < self.num_workers:
            raise ValueError(
                f"rollout.max_workers={self.max_workers} is below rollout.num_workers ({self.num_workers}); "
                "raise it, or leave it at 0 for a fixed number"
            )
        for name in ("upscale_delay_s", "downscale_delay_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"rollout.{name}={getattr(self, name)}: must be 0 or more")
        deadlines = ("start_timeout_s", "no_worker_timeout_s", "turn_timeout_s", "episode_timeout_s")
        for name in (*deadlines, "health_check_interval_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"rollout.{name}={getattr(self, name)}: must be positive")
        if self.cpus_per_worker < 0:
            raise ValueError(f"rollout.cpus_per_worker={self.cpus_per_worker}: must be 0 or more")

    @property
    def worker_limit(self) -> int:
        """How many workers there may be."""
        return self.max_workers or self.num_workers
