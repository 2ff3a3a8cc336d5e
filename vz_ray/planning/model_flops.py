"""Floating point operations of a Qwen2.5-VL; a multiplication and an addition are two.

Matrix products and attention alone: norms, activations and rotary positions are below a percent.
All are of one forward pass. Backward takes twice as many for what is trained, and as many for matrices that
gradients only go through; recomputing activations (gradient checkpointing) once more.
"""

from __future__ import annotations

from vz_ray.planning.model_shape import ModelShape, VisionShape

BACKWARD_FACTOR = 2
"""Forward passes that a backward pass is worth: gradients of the inputs and of the weights."""
FROZEN_BACKWARD_FACTOR = 1
"""The same of matrices that are not trained themselves: gradients of the inputs alone."""


def text_flops(shape: ModelShape, tokens: int, pairs: int) -> int:
    """Of the language model's layers, without `lm_head`.

    Args:
        shape: The model.
        tokens: Tokens that go through it.
        pairs: Pairs of a query and a key that it attends to, in one layer; every layer has the same.
            See `causal_pairs` and `packed_pairs`.
    """
    text = shape.text
    return text.layers * (2 * tokens * text.layer_weights + 4 * pairs * text.hidden)


def head_flops(shape: ModelShape, tokens: int) -> int:
    """Of the logits of so many tokens: `lm_head` sees those alone whose log-probs are wanted."""
    return 2 * tokens * shape.text.hidden * shape.text.vocab_size


def vision_flops(shape: ModelShape, patches: int, pairs: int) -> int:
    """Of the vision tower and its merger.

    Args:
        shape: The model.
        patches: Patches that go through it.
        pairs: Pairs of a query and a key in all blocks together, since some attend to windows and
            some to whole images. See `vision_pairs`.
    """
    vision = shape.vision
    blocks = 2 * patches * vision.depth * vision.block_weights + 4 * pairs * vision.hidden
    ends = 2 * patches * vision.patch_elements * vision.hidden
    return blocks + ends + 2 * (patches // vision.merge_size**2) * vision.merger_weights


def causal_pairs(tokens: int) -> int:
    """Of one sequence in which each token sees itself and those before it."""
    return tokens * (tokens + 1) // 2


def packed_pairs(prefix: int, branches: list[int]) -> int:
    """Of one prefix and the branches that go on from it, none of which sees another."""
    return causal_pairs(prefix) + sum(branch * prefix + causal_pairs(branch) for branch in branches)


def vision_pairs(vision: VisionShape, rows: int, columns: int) -> int:
    """Of one image of `rows` x `columns` patches, in all blocks together.

    Windows are cut from the upper left corner; those at the other edges are smaller.
    """
    full = len(vision.full_attention_blocks)
    side = vision.window_size // vision.patch_size // vision.merge_size * vision.merge_size
    heights, widths = _cuts(rows, side), _cuts(columns, side)
    windowed = sum((height * width) ** 2 for height in heights for width in widths)
    return full * (rows * columns) ** 2 + (vision.depth - full) * windowed


def _cuts(length: int, side: int) -> list[int]:
    return [min(side, length - start) for start in range(0, length, side)]
