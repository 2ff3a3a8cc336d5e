"""Training of the policy: advantages, losses, and a DeepSpeed trainer.

Input: groups of trajectories (tokens, grids, frame references, rewards) and the pixels of their frames.
Output: weights under their HF names, metrics, checkpoints and HF exports.
The package must not import vLLM, rollout or decode. All modules except those of the Ray actors
(`learner`, `learner_actor`, `weight_transports`) run under plain torchrun.
"""

from vz_ray.learner.trainer import Trainer

__all__ = ["Trainer"]
