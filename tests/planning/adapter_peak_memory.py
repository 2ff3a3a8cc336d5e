"""Peak memory of passes with LoRA adapters, in a separate process without leftovers of other tests.

python -m tests.planning.adapter_peak_memory FAMILY
"""

from __future__ import annotations

import json
import sys
from itertools import product

import torch

from tests.planning.pass_memory import LiveTensors, pack_batch, wide_policy
from vz_ray.config.learner import LoraConfig
from vz_ray.learner.lora import add_adapters


def peak(family: str, dtype: str, dropout: float, checkpointing: bool) -> int:
    """Return the maximum live bytes of a forward and backward pass, excluding weights."""
    policy = wide_policy(family, getattr(torch, dtype))
    if checkpointing:
        policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
    add_adapters(policy.hf, LoraConfig(rank=4, dropout=dropout), family, seed=0)
    batch = pack_batch(policy)
    with LiveTensors() as live:
        logprobs, entropy = policy(batch)
        (logprobs.sum() + entropy.sum()).backward()
    return live.peak


if __name__ == "__main__":
    cases = list(product(("float32", "bfloat16"), (0.0, 0.1), (False, True)))
    peaks = [[*case, peak(sys.argv[1], *case)] for case in cases]
    print(json.dumps(peaks))
