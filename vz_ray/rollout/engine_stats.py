"""Counters of an engine and the free capacity of its key/value cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class WorkerCapacity:
    """Capacity of a worker at its last report.

    Attributes:
        free_tokens: Free tokens in the key/value cache, including evictable cached prefixes.
        running_episodes: Episodes that held a slot.
    """

    free_tokens: int
    running_episodes: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start of the engine, and its current state.

    Attributes:
        turns: Turns finished.
        prompt_tokens: Prompt tokens of all turns, including visual tokens.
        cached_tokens: Prompt tokens served by the prefix cache.
        sampled_tokens: Sampled tokens.
        frames: Frames of all turns.
        cached_frames: Frames served by the cache of preprocessed frames.
        preempted_turns: Turns preempted by vLLM's scheduler for lack of key/value cache.
        running_turns: Turns running now.
        kv_cache_tokens: Size of the key/value cache, tokens.
        kv_cache_used_tokens: Tokens in use by running turns.
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
    """Stat logger for `AsyncLLM`: collect scheduler statistics of one engine."""

    def __init__(self) -> None:
        self._usage = 0.0
        self._frames = self._cached_frames = self._preempted_turns = 0

    def __call__(self, vllm_config: Any, engine_index: int) -> EngineStatLogger:
        """Act as the stat logger factory. There is one engine, so return `self`."""
        self._cache = vllm_config.cache_config
        return self

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Record one scheduler step."""
        if scheduler_stats is not None:
            self._usage = scheduler_stats.kv_cache_usage
            self._preempted_turns += scheduler_stats.prefix_cache_stats.preempted_requests
        if mm_cache_stats is not None:
            self._frames += mm_cache_stats.queries
            self._cached_frames += mm_cache_stats.hits

    def log(self) -> None:
        """Do nothing: statistics are read with `merge_into`."""

    log_engine_initialized = log

    def merge_into(self, stats: EngineStats) -> EngineStats:
        """Return `stats` with the scheduler statistics filled in."""
        tokens = self._cache.kv_cache_size_tokens or 0
        return replace(
            stats,
            frames=self._frames,
            cached_frames=self._cached_frames,
            preempted_turns=self._preempted_turns,
            kv_cache_tokens=tokens,
            kv_cache_used_tokens=round(self._usage * tokens),
        )
