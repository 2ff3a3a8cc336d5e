"""vLLM worker extension: log-probs of prompt tokens under the distribution that turns are sampled from.

vLLM computes the log-probs of prompt tokens from the model's logits: its logits processors and the temperature apply
to sampled tokens only. A student samples with both, so the engine that scores its tokens needs both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class SamplingDistribution:
    """Mixed into vLLM's worker (`worker_extension_cls`). Both model runners call `model.compute_logits`."""

    model_runner: Any

    def set_sampling_distribution(self, banned_token_ids: Sequence[int], temperature: float) -> None:
        """Set the logits of `banned_token_ids` to minus infinity and divide all by `temperature`, once per engine."""
        import torch

        model = self.model_runner.model
        compute_logits = model.compute_logits
        banned: torch.Tensor | None = None

        def masked_logits(*args: Any, **kwargs: Any) -> torch.Tensor | None:
            nonlocal banned
            logits = compute_logits(*args, **kwargs)
            if logits is None:  # on the ranks that do not sample
                return None
            if banned is None:
                banned = torch.tensor(list(banned_token_ids), dtype=torch.long, device=logits.device)
            return logits.float().index_fill_(-1, banned, float("-inf")).div_(temperature)

        model.compute_logits = masked_logits
