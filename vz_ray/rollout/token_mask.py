"""Tokens that no turn may contain: image slots exist only where a frame is.

A logits processor rather than `bad_words` (which walks over requests in
Python at every step) or `logit_bias` (clamped to +-100, so no ban at all). It
sets logits to minus infinity before temperature, so processed log-probs are
those of the banned and tempered distribution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.sample.logits_processor.interface import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as RunnerV2Processor

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BANNED_TOKENS_KEY = "vz_ray_banned_token_ids"
"""Where the ids travel in the engine's `additional_config`."""


class TokenMask(LogitsProcessor, RunnerV2Processor):
    """Bans the same ids for every request; serves both of vLLM's model runners."""

    def __init__(self, vllm_config: VllmConfig, device_or_state: Any, is_pin_memory: bool = False) -> None:
        # The second argument is a device in one runner, request state with a device in the other.
        ids = vllm_config.additional_config[BANNED_TOKENS_KEY]
        self._ids = torch.tensor(
            ids, dtype=torch.long, device=getattr(device_or_state, "device", device_or_state)
        )

    def apply(self, logits: torch.Tensor, ctx: object = None) -> torch.Tensor:
        """`logits` are `[rows, vocab]`, changed in place."""
        return logits.index_fill_(-1, self._ids, float("-inf"))

    def is_argmax_invariant(self) -> bool:
        """False: greedy turns obey the ban, too."""
        return False

    def update_state(self, batch_update: object) -> None:
        """The ban is the same for every request, so there is no state to follow."""
        return None
