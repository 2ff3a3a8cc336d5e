"""Memory of the token mask: it outlives the sleep of an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from vz_ray.rollout.token_mask import BANNED_TOKENS_KEY, TokenMask


def test_constructor_allocates_no_device_memory() -> None:
    """vLLM constructs the processor in the weights' memory pool, which sleep discards."""
    config: Any = SimpleNamespace(additional_config={BANNED_TOKENS_KEY: [1, 3]})
    mask = TokenMask(config, torch.device("meta"))
    logits = mask.apply(torch.zeros(2, 5))
    assert logits.isinf().nonzero().tolist() == [[0, 1], [0, 3], [1, 1], [1, 3]]
