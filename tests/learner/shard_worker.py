"""One of two ranks that share each sequence, without DeepSpeed, so that the model can be float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.learner.test_shared_prefix import TOLERANCE, GradientCheck, remove_float32_rounding
from vz_ray.learner.sequence_parallel import SequenceShard

CASES = [(dtype, slices) for dtype in TOLERANCE for slices in (0, 20)]
"""Dtypes, and maximum patches of a pass of the vision tower and tokens of a tile of the MLPs."""


def run_shard(rank: int, model: Path, folder: Path) -> None:
    """Save the loss and this rank's gradients of each case."""
    patch = pytest.MonkeyPatch()
    remove_float32_rounding(patch)
    patch.setenv("LOCAL_RANK", "0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    shard = SequenceShard(rank, 2, dist.group.WORLD)
    results = [
        GradientCheck(model, dtype, checkpointing=True, slice_patches=slices, tile_tokens=slices).run_shared(
            shard=shard
        )
        for dtype, slices in CASES
    ]
    torch.save(results, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()
