"""Peak memory of passes with LoRA adapters, in a separate process without leftovers of other tests.

python -m tests.planning.adapter_peak_memory MODEL
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

import torch

from tests.planning.pass_memory import LiveTensors, make_wide_training_data, pack_batch
from vz_ray.config.learner import LoraConfig
from vz_ray.learner.lora import add_adapters
from vz_ray.learner.policy_model import PolicyModel


def peak(model: Path, dtype: str, dropout: float, checkpointing: bool) -> int:
    """Return the maximum live bytes of a forward and backward pass, excluding weights."""
    data = make_wide_training_data(model)
    policy = PolicyModel.from_pretrained(data.model, getattr(torch, dtype), chunk=64).train()
    if checkpointing:
        policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
    add_adapters(policy.hf, LoraConfig(rank=4, dropout=dropout), str(data.model), seed=0)
    batch = pack_batch(data, policy)
    with LiveTensors() as live:
        logprobs, entropy = policy(batch)
        (logprobs.sum() + entropy.sum()).backward()
    return live.peak


if __name__ == "__main__":
    cases = list(product(("float32", "bfloat16"), (0.0, 0.1), (False, True)))
    peaks = [[*case, peak(Path(sys.argv[1]), *case)] for case in cases]
    print(json.dumps(peaks))
