"""Plans this rank's micro-batches and builds them ahead of the computation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from vz_ray.config.learner import LearnerConfig
from vz_ray.learner.batch import HostBatch, MicroBatch, collate_on_host
from vz_ray.learner.distributed import RankInfo
from vz_ray.learner.example import Example, SpecialTokenIds
from vz_ray.learner.frame_cache import FeatureCache
from vz_ray.learner.image_inputs import PixelLoader, in_memory_pixels
from vz_ray.learner.image_patches import ImageSpec
from vz_ray.learner.packing import FlopCosts, PrefixTree, plan_micro_batches
from vz_ray.utils.prefetch import prefetch
from vz_ray.video.frame import RGB

Pixels = PixelLoader | Mapping[str, RGB]
"""Pixels by digest, or a function that loads the pixels of given frame references."""


@dataclass(slots=True)
class InputTimes:
    """Time of host work since the last reset.

    Attributes:
        build_seconds: Loading frames and building micro-batches.
        wait_seconds: Part of it for which the computation waited.
    """

    build_seconds: float = 0.0
    wait_seconds: float = 0.0

    def metrics(self) -> dict[str, float]:
        """Return the times as metrics of a step."""
        return {"input_build_seconds": self.build_seconds, "input_wait_seconds": self.wait_seconds}


class MicroBatchLoader:
    """Builds the micro-batches of one rank, up to `prefetch_batches` ahead in a thread.

    Args:
        costs: Cost coefficients of the model, used to balance ranks.

    Attributes:
        times: Time of host work; replace it to start from zero.
        before_batch: Called before each micro-batch is taken; its exception ends the pass.
    """

    def __init__(
        self,
        config: LearnerConfig,
        rank_info: RankInfo,
        tokens: SpecialTokenIds,
        spec: ImageSpec,
        costs: FlopCosts,
    ) -> None:
        self._config, self._rank_info = config, rank_info
        self._tokens, self._spec, self._costs = tokens, spec, costs
        self._on_gpu = rank_info.device.type == "cuda"
        self.times = InputTimes()
        self.before_batch: Callable[[], None] = _continue

    def plan(self, examples: Sequence[Example]) -> list[list[PrefixTree]]:
        """Return this rank's micro-batches; see `plan_micro_batches` for errors."""
        plan = plan_micro_batches(
            examples,
            self._config.micro_batch_tokens,
            self._rank_info.num_batches,
            self._costs,
            share_prefixes=self._config.share_prefixes,
        )
        return plan[self._rank_info.batch_index]

    @contextmanager
    def load(
        self,
        examples: Sequence[Example],
        micro_batches: Sequence[list[PrefixTree]],
        pixels: Pixels,
        cache: FeatureCache | None,
    ) -> Iterator[Iterator[MicroBatch]]:
        """Build the micro-batches in order; run the forward pass of each before the next is taken.

        If the block fails, `cache` is cleared: it can hold entries that were not computed.

        Raises:
            Exception: Errors of `pixels` and `collate_on_host`, when the micro-batch is taken.
        """
        load_pixels = in_memory_pixels(pixels) if isinstance(pixels, Mapping) else pixels

        def build(trees: list[PrefixTree]) -> HostBatch:
            started = time.perf_counter()
            batch = collate_on_host(
                trees,
                examples,
                load_pixels,
                self._tokens,
                self._spec,
                cache=cache,
                pin=self._on_gpu,
                shard=self._rank_info.shard,
            )
            self.times.build_seconds += time.perf_counter() - started
            return batch

        ahead = self._config.prefetch_batches
        try:
            with prefetch(build, micro_batches, ahead, initializer=self._set_device) as host_batches:
                yield self._upload(host_batches)
        except BaseException:
            if cache is not None:
                cache.clear()
            raise

    def _upload(self, host_batches: Iterator[HostBatch]) -> Iterator[MicroBatch]:
        while True:
            self.before_batch()
            started = time.perf_counter()
            batch = next(host_batches, None)
            self.times.wait_seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch.to(self._rank_info.device)

    @contextmanager
    def checked_by(self, check: Callable[[], None]) -> Iterator[None]:
        """Call `check` before each micro-batch of the block."""
        self.before_batch = check
        try:
            yield
        finally:
            self.before_batch = _continue

    def _set_device(self) -> None:
        # Without it, pinning memory in a new thread would create a CUDA context on the first GPU.
        if self._on_gpu:
            torch.cuda.set_device(self._rank_info.device)


def _continue() -> None:
    """Check nothing."""
