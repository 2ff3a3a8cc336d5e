"""Speed of an engine: time per sampled token, per prefill, and per rollout of a step.

Sampling is bound by memory traffic at small batches and by FLOPs at large ones; prefill is bound by FLOPs. Prefills
and sampling share the engine's time. `benchmarks/cluster_simulation.py` simulates each episode with the same rates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from vz_ray.families import ModelShape
from vz_ray.planning.assumptions import Assumptions
from vz_ray.planning.episode_budget import CLIP_TEXT_TOKENS, EpisodeBudget
from vz_ray.planning.kv_cache import layer_state_bytes

ZOOM_CPU_S = 0.184
"""CPU seconds to decode a zoom of a video of 640x360 (docs/decode.md)."""
OVERVIEW_CPU_S = 4.65
"""CPU seconds to decode an overview of such a video, once per task (docs/decode.md)."""


@dataclass(frozen=True, slots=True)
class EngineSpeed:
    """Performance model of one engine; the defaults are those of Qwen2.5-VL-7B on an H100.

    Attributes:
        params: Parameters of the language model.
        expert_params: Those of its experts.
        expert_share: Fraction of the experts that compute a token. Tokens are assumed to choose independently.
        vision_params: Parameters of the vision tower.
        kv_bytes: KV cache bytes per token.
        state_bytes: Bytes per sequence of the states of linear attention, which each token reads and writes.
        patches_per_token: Patches of a visual token.
        flops: Peak bfloat16 FLOPs per second.
        bandwidth: Memory bandwidth in bytes per second.
        decode_share: Fraction of the bandwidth that sampling reaches.
        prefill_mfu: Fraction of the peak that prefill reaches.
    """

    params: float = 7.6e9
    expert_params: float = 0.0
    expert_share: float = 1.0
    vision_params: float = 0.68e9
    kv_bytes: float = 57_344
    state_bytes: float = 0.0
    patches_per_token: float = 4.0
    flops: float = 989e12
    bandwidth: float = 3.35e12
    decode_share: float = 0.6
    prefill_mfu: float = 0.4

    @classmethod
    def of_gpus(cls, shape: ModelShape, assumptions: Assumptions, num_gpus: int) -> Self:
        """Return the speed of a bfloat16 engine on `num_gpus` GPUs."""
        text = shape.text
        return cls(
            params=text.parameters,
            expert_params=text.expert_weights,
            expert_share=text.experts.share if text.experts else 1.0,
            vision_params=shape.vision.parameters,
            kv_bytes=2 * 2 * text.attention_layers * text.kv_dim,
            state_bytes=text.linear.layers * layer_state_bytes(text.linear, 2) if text.linear else 0.0,
            patches_per_token=shape.vision.merge_size**2,
            flops=num_gpus * assumptions.peak_tflops * 1e12,
            bandwidth=num_gpus * assumptions.memory_gbps * 1e9,
            decode_share=assumptions.decode_share,
            prefill_mfu=assumptions.prefill_mfu,
        )

    def step_s(self, batch: int, context: float) -> float:
        """Return the time of one sampled token for each of `batch` sequences of `context` tokens."""
        moved_bytes = 2 * self._used_params(batch) + batch * (context * self.kv_bytes + 2 * self.state_bytes)
        return max(
            moved_bytes / (self.bandwidth * self.decode_share),
            2 * self._used_params(1) * batch / (self.flops * self.prefill_mfu),
        )

    def _used_params(self, tokens: int) -> float:
        """Return the parameters of the language model that compute at least one of `tokens`."""
        return self.params - self.expert_params * (1 - self.expert_share) ** tokens

    def prefill_s(self, tokens: float, frames: float, tokens_per_frame: float) -> float:
        """Return the prefill time of new tokens and their frames."""
        patches = self.patches_per_token * tokens_per_frame * frames
        return 2 * (self._used_params(1) * tokens + self.vision_params * patches) / (self.flops * self.prefill_mfu)


@dataclass(frozen=True, slots=True)
class RolloutWork:
    """The rollout of one step.

    Attributes:
        episode: A typical episode.
        zooms: Its zooms.
        batch_size: Tasks.
        group_size: Samples per task.
        concurrency: Concurrent episodes of an engine.
        decoder_cpus: CPUs of all decoders.
    """

    episode: EpisodeBudget
    zooms: int
    batch_size: int
    group_size: int
    concurrency: int
    decoder_cpus: float

    def seconds(self, speed: EngineSpeed, engines: int) -> float:
        """Return the time until the last episode ends: work of the busiest resource, and the last episodes' latency.

        Every group is assumed to be kept: groups of equal rewards would be replaced by further ones.
        """
        episode = self.episode
        episodes = math.ceil(self.batch_size * self.group_size / engines)
        batch = max(1, min(self.concurrency, episodes))
        context = (episode.prefix_tokens + episode.tokens) / 2
        token_s = speed.step_s(batch, context)
        prefix_s = speed.prefill_s(episode.prefix_tokens, episode.overview_frames, episode.frame.tokens)
        clip_frames = episode.zoom_frames / max(1, self.zooms)
        clip_tokens = CLIP_TEXT_TOKENS + clip_frames * episode.tokens_per_frame
        clip_s = speed.prefill_s(clip_tokens, clip_frames, episode.frame.tokens)
        sampling_s = episodes / batch * episode.sampled_tokens * token_s
        prefills_s = math.ceil(episodes / self.group_size) * prefix_s + episodes * self.zooms * clip_s
        decoding_s = self.batch_size * (OVERVIEW_CPU_S + self.group_size * self.zooms * ZOOM_CPU_S) / self.decoder_cpus
        # The last episodes run with few others.
        tail_s = episode.sampled_tokens * speed.step_s(1, context) + self.zooms * (clip_s + ZOOM_CPU_S)
        return max(sampling_s + prefills_s, decoding_s) + OVERVIEW_CPU_S + tail_s
