"""What an engine says of itself: counts since its start, and the room in its key/value cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class WorkerCapacity:
    """What a worker could still take in, when it last said so.

    Attributes:
        free_tokens: Tokens that its key/value cache has room for, those of cached prefixes included.
        running_episodes: Episodes that it played then.
    """

    free_tokens: int
    running_episodes: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the start of the engine.

    Attributes:
        prompt_tokens: Of all turns, visual ones included.
        cached_tokens: Those of them that the prefix cache spared.
        frames: Frames of all turns.
        cached_frames: Those of them that were preprocessed before, so that none was sent again.
        preempted_turns: Turns that gave their place in the key/value cache back before they had ended.
        running_turns: Turns at this moment.
        kv_cache_tokens: Size of the key/value cache.
        kv_cache_used_tokens: Tokens of it that turns at this moment need.
    """

    turns: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    sampled_tokens: int = 0
    frames: int = 0
    cached_frames: int = 0
    preempted_turns: int = 0
    running_turns: int = 0
    kv_cache_tokens: int = 0
    kv_cache_used_tokens: int = 0


class EngineStatLogger:
    """Listens to vLLM's scheduler; a per-engine stat logger in the sense of `AsyncLLM`."""

    def __init__(self) -> None:
        self._kv_tokens = 0
        self._usage = 0.0
        self._frames = self._cached_frames = self._preempted = 0

    def __call__(self, vllm_config: Any, engine_index: int) -> EngineStatLogger:
        """As a factory it makes itself: there is one engine."""
        self._cache = vllm_config.cache_config
        return self

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """After each step of the engine."""
        if scheduler_stats is not None:
            self._usage = scheduler_stats.kv_cache_usage
            self._preempted += scheduler_stats.prefix_cache_stats.preempted_requests
        if mm_cache_stats is not None:
            self._frames += mm_cache_stats.queries
            self._cached_frames += mm_cache_stats.hits

    def log(self) -> None:
        """Nothing: whoever wants to know asks."""

    log_engine_initialized = log

    def merge_into(self, stats: EngineStats) -> EngineStats:
        """`stats` with what is known here."""
        tokens = self._cache.kv_cache_size_tokens or 0
        return replace(
            stats,
            frames=self._frames,
            cached_frames=self._cached_frames,
            preempted_turns=self._preempted,
            kv_cache_tokens=tokens,
            kv_cache_used_tokens=round(self._usage * tokens),
        )
