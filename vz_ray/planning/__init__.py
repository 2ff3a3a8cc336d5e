"""Planning: tokens, FLOPs and GPU memory of a run before it starts.

Input: a config, the shape of the model, the memory of a GPU. Output: token budgets, FLOPs, memory of each
learner rank and engine, whether they fit, and config changes if they do not. Must not import torch, Ray,
vLLM or DeepSpeed; formulas describe their allocations.
"""

from vz_ray.planning.model_flops import head_flops, packed_pairs, text_flops, vision_flops

__all__ = ["head_flops", "packed_pairs", "text_flops", "vision_flops"]
