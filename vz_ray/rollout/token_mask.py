"""Logits processor that masks vision placeholders, so that the policy cannot sample image slots.

vLLM's `bad_words` iterates over requests in Python at every step, and `logit_bias` is clamped to
+-100, which does not mask. This processor sets logits to minus infinity before the temperature is
applied, so the processed log-probs are those of the masked, tempered distribution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.sample.logits_processor.interface import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as RunnerV2Processor

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BANNED_TOKENS_KEY = "vz_ray_banned_token_ids"
"""Key of the masked token ids in the engine's `additional_config`."""


class TokenMask(LogitsProcessor, RunnerV2Processor):
    """Mask the same token ids in every request. Works with both of vLLM's model runners."""

    def __init__(self, vllm_config: VllmConfig, device_or_state: Any, is_pin_memory: bool = False) -> None:
        self._ids: list[int] = vllm_config.additional_config[BANNED_TOKENS_KEY]
        self._device_ids: torch.Tensor | None = None

    def apply(self, logits: torch.Tensor, ctx: object = None) -> torch.Tensor:
        """Mask `logits` `[rows, vocab]` in place."""
        if self._device_ids is None:
            # Not in the constructor: vLLM calls it with the memory pool of the weights, which sleep discards.
            self._device_ids = torch.tensor(self._ids, dtype=torch.long, device=logits.device)
        return logits.index_fill_(-1, self._device_ids, float("-inf"))

    def is_argmax_invariant(self) -> bool:
        """Return False: the mask applies to greedy sampling, too."""
        return False

    def update_state(self, batch_update: object) -> None:
        """Do nothing: the mask does not depend on the request."""
        return None
