"""Engine of a teacher: log-probs of the tokens that a student sampled."""

from __future__ import annotations

from collections.abc import Sequence
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

        vLLM does not read its prefix cache for such a request, because cached tokens have no log-probs.

        Args:
            trajectory: A finished episode. Its token ids are scored as they are.
            frames: One per image, in order.

        Raises:
            ValueError: The engine reads other tokens than the learner, for example because its image processor resizes
                frames, or a log-prob is not finite.
            StepTimeout: The request exceeded the turn timeout.
            EngineFailedError: The engine process has died.
        """
        import vllm

        params = vllm.SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompt = Prompt(trajectory.compact_ids, tuple(frames), ())
        output = await self._generate(prompt, params, f"scoring of {trajectory.id}")
        ids = trajectory.expanded_ids
        if tuple(output.prompt_token_ids) != ids:
            raise ValueError(
                f"{self.name} reads {len(output.prompt_token_ids)} tokens in trajectory {trajectory.id} of {len(ids)} "
                "tokens; the image processors of teacher and student differ"
            )
        positions = np.flatnonzero(np.asarray(trajectory.loss_mask)).tolist()
        logprobs = tuple(float(output.prompt_logprobs[position][ids[position]].logprob) for position in positions)
        if not np.isfinite(logprobs).all():
            raise ValueError(f"{self.name} has log-probs of {trajectory.id} that are not finite")
        return logprobs
