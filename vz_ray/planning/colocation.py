"""GPU memory with `train.colocate`: a learner rank and an engine share a GPU and work in turns.

learning   learner as usual; the engine sleeps: weights and KV cache are freed
handover   learner states without activations; engine weights and workspaces without the KV cache
rollout    engine as usual; the learner's states are in host memory
"""

from __future__ import annotations

from dataclasses import replace

from vz_ray.planning.engine_memory import CUDA_GRAPHS, EngineMemory
from vz_ray.planning.gpu_memory import Certainty, MemoryFootprint, MemoryItem, MemoryPhase
from vz_ray.planning.learner_memory import CUDA_AND_NCCL_BYTES

_HANDED_OVER = ("weights", "frozen weights", "CUDA context and NCCL")
"""Learner allocations that stay on the GPU until the engine has the weights."""
_SLEEPING_ENGINE = "sleeping engine"
_KEPT_ASLEEP = ("CUDA context", CUDA_GRAPHS, "encoder cache")
"""Engine allocations outside the memory pools that vLLM frees for sleep."""


def take_turns(
    learner: MemoryFootprint, engine: EngineMemory, largest_tensor_bytes: int
) -> tuple[MemoryFootprint, EngineMemory, MemoryFootprint]:
    """Return the memory of a GPU while the learner works, while the engine works, and during the handover.

    Args:
        learner: Memory of a rank's GPU without an engine.
        engine: Memory of an engine's GPU without a rank.
        largest_tensor_bytes: Largest tensor of the model; the handover gathers at least one at a time.
    """
    asleep = sum(item.bytes for item in engine.footprint.items if item.name in _KEPT_ASLEEP)
    resident = tuple(item for item in learner.items if item.name in _HANDED_OVER)
    awake = tuple(
        replace(item, name=f"engine: {item.name}") for item in engine.footprint.items if item.name != "KV cache"
    )
    sleeping_learner = MemoryItem("sleeping learner", CUDA_AND_NCCL_BYTES, Certainty.ASSUMED)
    learning = replace(
        learner,
        component="learner, engine asleep",
        items=(*learner.items, MemoryItem(_SLEEPING_ENGINE, asleep, Certainty.ASSUMED)),
    )
    rollout = replace(
        engine.footprint, component="engine, learner asleep", items=(*engine.footprint.items, sleeping_learner)
    )
    bucket = MemoryItem("gathered bucket", largest_tensor_bytes)
    items = (*resident, bucket, *awake)
    handover = MemoryFootprint("handover of weights", learner.num_gpus, learner.capacity_bytes, items)
    return learning, replace(engine, footprint=rollout), handover


def state_bytes(learner: MemoryFootprint) -> int:
    """Return the bytes of a rank that move to host memory while the engine works."""
    kept = ("CUDA context and NCCL", _SLEEPING_ENGINE)
    held = [item for item in learner.items if item.phase is MemoryPhase.ALWAYS and item.name not in kept]
    return sum(item.bytes for item in held)
