"""Numbers of ranks that can share a sequence: they must divide the heads of the model."""

from __future__ import annotations

from pathlib import Path

from vz_ray.config.learner import LearnerConfig
from vz_ray.families import ModelShape, load_model_shape
from vz_ray.utils.errors import UserError

SIZES = (1, 2, 4, 8, 16)
"""Sizes that are tried and recommended."""


def sequence_parallel_problem(shape: ModelShape, size: int) -> str | None:
    """Return why `size` ranks cannot share a sequence; None if they can.

    Key and value heads are repeated if there are fewer of them than ranks.
    """
    text = shape.text
    counts = {"attention heads": text.heads}
    if text.linear:
        counts |= {"linear key heads": text.linear.key_heads, "linear value heads": text.linear.value_heads}
    for name, count in counts.items():
        if count % size:
            return f"does not divide the model's {count} {name}"
    if text.kv_heads % size and size % text.kv_heads:
        return f"is neither a divisor nor a multiple of the model's {text.kv_heads} key and value heads"
    return None


def check_sequence_parallel(shape: ModelShape, size: int) -> None:
    """Check that every rank gets the same number of heads.

    Raises:
        UserError: It does not.
    """
    if problem := sequence_parallel_problem(shape, size):
        allowed = [n for n in SIZES if sequence_parallel_problem(shape, n) is None]
        raise UserError(f"learner.sequence_parallel_size is {size}; it {problem}. For this model, use one of {allowed}")


def check_checkpoint_heads(model: str, learner: LearnerConfig) -> None:
    """Check `sequence_parallel_size` against the config.json of a checkpoint, before any process starts.

    A model without a config.json is not checked here; loading it fails.

    Raises:
        UserError: See `check_sequence_parallel` and `load_model_shape`.
    """
    if learner.sequence_parallel_size > 1 and (Path(model) / "config.json").is_file():
        check_sequence_parallel(load_model_shape(model), learner.sequence_parallel_size)
