"""Engine of a teacher: log-probs of the tokens that a student sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from vz_ray.config.rollout import EngineConfig
from vz_ray.env.protocols import Prompt
from vz_ray.env.trajectory import Trajectory
from vz_ray.rollout.sampling_distribution import SamplingDistribution
from vz_ray.rollout.vllm_engine import VllmEngine
from vz_ray.video.frame import Frame


class ScoringEngine(VllmEngine):
    """Scores whole trajectories in one request each, without sampling. Weights never change."""

    @classmethod
    async def start(cls, model: str | Path, config: EngineConfig, **options: Any) -> Self:
        """Start an engine; see `VllmEngine.start`."""
        extension = f"{SamplingDistribution.__module__}.{SamplingDistribution.__name__}"
        config = replace(
            config,
            # vLLM samples at least one token after the longest trajectory.
            max_model_len=config.max_model_len + 1,
            adapter_rank=0,
            options={**config.options, "worker_extension_cls": extension},
        )
        engine = await super().start(model, config, **options)
        assert isinstance(engine, cls)
        return engine

    async def set_temperature(self, temperature: float) -> None:
        """Score under the distribution that a student samples from: token mask and temperature. Call it once."""
        arguments = (list(self.banned_token_ids), temperature)
        call = self._process.llm.collective_rpc("set_sampling_distribution", args=arguments)
        await self._process.call("setting its temperature", call)

    async def score(self, trajectory: Trajectory, frames: Sequence[Frame]) -> tuple[float, ...]:
        """Return the log-probs `[S]` of the sampled tokens, one per 1 in `Trajectory.loss_mask`.

        The prompt that the samples of a group share is read from vLLM's prefix cache. Cached tokens have no log-probs:
        if the cache also has sampled tokens, because another sample begins with the same ones, the trajectory is
        scored again without it.

        Args:
            trajectory: A finished episode. Its token ids are scored as they are.
            frames: One per image, in order.

        Raises:
            ValueError: The engine reads other tokens than the learner, for example because its image processor resizes
                frames, or a log-prob is not finite.
            StepTimeout: The request exceeded the turn timeout.
            EngineFailedError: The engine process has died.
        """
        logprobs = await self._score(trajectory, frames, read_cache=True)
        if logprobs is None:
            logprobs = await self._score(trajectory, frames, read_cache=False)
        if logprobs is None or not np.isfinite(logprobs).all():
            raise ValueError(f"{self.name} has no finite log-probs of all sampled tokens of {trajectory.id}")
        return logprobs

    async def _score(
        self, trajectory: Trajectory, frames: Sequence[Frame], *, read_cache: bool
    ) -> tuple[float, ...] | None:
        """Return the log-probs of the sampled tokens; None if some of these tokens were cached."""
        import vllm

        params = vllm.SamplingParams(
            temperature=1.0,
            max_tokens=1,
            prompt_logprobs=0,
            detokenize=False,
            skip_reading_prefix_cache=not read_cache,
        )
        prompt = Prompt(trajectory.compact_ids, tuple(frames), ())
        output = await self._generate(prompt, params, f"scoring of {trajectory.id}")
        ids = trajectory.expanded_ids
        if tuple(output.prompt_token_ids) != ids:
            raise ValueError(
                f"{self.name} reads {len(output.prompt_token_ids)} tokens in trajectory {trajectory.id} of {len(ids)} "
                "tokens; the image processors of teacher and student differ"
            )
        positions = np.flatnonzero(np.asarray(trajectory.loss_mask)).tolist()
        return _logprobs_at(positions, ids, output.prompt_logprobs, output.num_cached_tokens or 0)


def _logprobs_at(
    positions: Sequence[int], ids: Sequence[int], rows: Sequence[Mapping[int, Any] | None], num_cached: int
) -> tuple[float, ...] | None:
    """Return the log-probs of the tokens at `positions`, ascending; None if one of them was cached.

    Args:
        rows: vLLM's `prompt_logprobs`. The first model runner returns all tokens, undefined if cached; the second one
            the computed tokens only.
        num_cached: Tokens that were read from the prefix cache.
    """
    if positions[0] <= num_cached:
        return None
    offset = len(ids) - len(rows)
    entries = [rows[position - offset] for position in positions if position > offset]
    if len(entries) < len(positions):
        return None
    pairs = [(row or {}).get(ids[position]) for position, row in zip(positions, entries, strict=True)]
    return None if None in pairs else tuple(float(entry.logprob) for entry in pairs if entry is not None)
