"""Config of the rollout workers: their engines, their deadlines, how many there are."""

from __future__ import annotations

from dataclasses import dataclass, field

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class EngineConfig:
    """What vLLM is started with.

    Attributes:
        dtype: `float32` on CPU (log-probs equal the learner's), `bfloat16` on GPUs.
        kv_cache_gib: GiB of key/value cache; null takes `gpu_memory` of the device instead.
        gpu_memory: Fraction of a GPU's memory that the engine may use, if `kv_cache_gib` is null.
        mm_cache_gib: GiB for preprocessed frames, so that those of a group's other samples
            and of earlier turns are not sent again (about 2.4 MB for 128 visual tokens).
        max_model_len: Most tokens in a conversation, visual tokens included.
        max_num_seqs: Most turns that are sampled at once.
        images_per_prompt: Most frames in a conversation.
        tensor_parallel: GPUs per engine.
        threads: CPU threads of an engine on CPU; 0 leaves it to the environment.
        enforce_eager: No graph capture; starts faster, and is the only way on CPU.
    """

    dtype: str = "float32"
    kv_cache_gib: float | None = 1.0
    gpu_memory: float = 0.85
    mm_cache_gib: float = 0.5
    max_model_len: int = 32768
    max_num_seqs: int = 16
    images_per_prompt: int = 128
    tensor_parallel: int = 1
    threads: int = 0
    enforce_eager: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"engine.dtype={self.dtype!r}: use one of {', '.join(_DTYPES)}")
        if self.kv_cache_gib is not None and self.kv_cache_gib <= 0:
            raise ValueError(f"engine.kv_cache_gib={self.kv_cache_gib}: must be positive or null")
        if not 0 < self.gpu_memory <= 1:
            raise ValueError(f"engine.gpu_memory={self.gpu_memory}: must be in (0, 1]")
        for name in ("max_model_len", "max_num_seqs", "images_per_prompt", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"engine.{name}={getattr(self, name)}: must be at least 1")
        if self.threads < 0:
            raise ValueError(f"engine.threads={self.threads}: must be 0 or more")


@dataclass
class RolloutConfig:
    """The fleet of rollout workers.

    Attributes:
        engine: What each worker's engine is started with.
        workers: How many workers there are; the fewest where there may be more, 0 lets all go
            when there is nothing to play.
        max_workers: Most workers: further ones are started while episodes wait for a place, which makes
            Ray's autoscaler look for nodes; 0 keeps them at `workers`.
        grow_s: Seconds that episodes must have waited before workers are started.
        shrink_s: Seconds that a worker must have been too many before it is let go.
        episodes_per_worker: Most episodes that one worker plays at once.
        cpus_per_worker: Logical CPUs that Ray reserves for a worker.
        group: Workers are placed on nodes that have a Ray resource of this name; empty allows all.
        attempts: Most times that an episode is played before it is given up
            (a worker that dies takes its episodes with it; they are played again).
        start_deadline_s: Seconds in which an engine must have started.
        nodes_deadline_s: Seconds that episodes may wait while there is no worker at all, such as when every
            node was taken away; the run stops then, and can be resumed.
        turn_deadline_s: Seconds in which a turn must have been sampled.
        episode_deadline_s: Seconds in which an episode must have been played.
        health_every_s: Seconds between looks at workers that nobody asks anything of.
    """

    engine: EngineConfig = field(default_factory=EngineConfig)
    workers: int = 1
    max_workers: int = 0
    grow_s: float = 10.0
    shrink_s: float = 120.0
    episodes_per_worker: int = 32
    cpus_per_worker: float = 1.0
    group: str = ""
    attempts: int = 3
    start_deadline_s: float = 600.0
    nodes_deadline_s: float = 3600.0
    turn_deadline_s: float = 300.0
    episode_deadline_s: float = 1200.0
    health_every_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("episodes_per_worker", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name}={getattr(self, name)}: must be at least 1")
        if self.workers < (0 if self.max_workers else 1):
            raise ValueError(
                f"rollout.workers={self.workers}: must be at least 1, or 0 with rollout.max_workers"
            )
        if self.max_workers and self.max_workers < self.workers:
            raise ValueError(
                f"rollout.max_workers={self.max_workers} is below rollout.workers ({self.workers}); "
                "raise it, or leave it at 0 for a fixed number"
            )
        for name in ("grow_s", "shrink_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"rollout.{name}={getattr(self, name)}: must be 0 or more")
        deadlines = ("start_deadline_s", "nodes_deadline_s", "turn_deadline_s", "episode_deadline_s")
        for name in (*deadlines, "health_every_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"rollout.{name}={getattr(self, name)}: must be positive")
        if self.cpus_per_worker < 0:
            raise ValueError(f"rollout.cpus_per_worker={self.cpus_per_worker}: must be 0 or more")

    @property
    def most_workers(self) -> int:
        """How many workers there may be."""
        return self.max_workers or self.workers
