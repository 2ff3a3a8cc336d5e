"""What a run will take, before it takes it: tokens, arithmetic, memory of each GPU.

In: a config, the model's shape, the memory of a GPU. Out: budgets, floating point operations, what
every learner rank and engine holds, whether that fits, and what to change if it does not.

It must not know torch, Ray, vLLM or DeepSpeed: what they allocate is written down here as formulas.
"""

from vz_ray.planning.model_flops import head_flops, packed_pairs, text_flops, vision_flops
from vz_ray.planning.model_shape import ModelShape

__all__ = ["ModelShape", "head_flops", "packed_pairs", "text_flops", "vision_flops"]
