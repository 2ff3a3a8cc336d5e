"""Peaks of passes with adapters, in a process of its own: what other tests left behind is not in them.

python -m tests.planning.adapter_peak_memory MODEL
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

import torch

from tests.planning.pass_memory import LiveTensors, make_wide_world, pack_batch
from vz_ray.config.learner import LoraConfig
from vz_ray.learner.lora import add_adapters
from vz_ray.learner.policy_model import PolicyModel


def peak(model: Path, dtype: str, dropout: float, checkpointing: bool) -> int:
    """Most bytes at one time of a pass forward and backward, weights left out."""
    world = make_wide_world(model)
    policy = PolicyModel.from_pretrained(world.model, getattr(torch, dtype), chunk=64).train()
    if checkpointing:
        policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
    add_adapters(policy.hf, LoraConfig(rank=4, dropout=dropout), str(world.model), seed=0)
    batch = pack_batch(world, policy)
    with LiveTensors() as live:
        logprobs, entropy = policy(batch)
        (logprobs.sum() + entropy.sum()).backward()
    return live.peak


if __name__ == "__main__":
    cases = list(product(("float32", "bfloat16"), (0.0, 0.1), (False, True)))
    found = [[*case, peak(Path(sys.argv[1]), *case)] for case in cases]
    print(json.dumps(found))
