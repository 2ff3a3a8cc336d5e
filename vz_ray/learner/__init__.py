"""Learns from trajectories: advantages, losses, and a DeepSpeed trainer.

In: groups of trajectories (tokens, grids, frame references, rewards) and the
pixels of their frames. Out: updated weights under their HF names, metrics,
checkpoints, HF-format exports.

It must not know how episodes are played or by which engine (no vLLM), nor who
schedules it: everything but the actor runs under plain `torchrun`.
"""

from vz_ray.learner.trainer import Trainer

__all__ = ["Trainer"]
