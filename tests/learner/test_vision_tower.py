"""The optimized vision tower against HF's: features, gradients, index tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vz_ray.families import load_model_shape
from vz_ray.learner.policy_model import load_pretrained
from vz_ray.learner.vision_tower import optimize_vision_tower, slice_frames, vision_tables

# One window, several with partial edges, tall, wide; repeated and mixed.
GRIDS = [(1, 2, 2), (1, 2, 2), (1, 12, 20), (1, 6, 2), (1, 8, 8), (1, 2, 2), (1, 2, 22)]


@pytest.mark.parametrize("grids", [GRIDS, [(1, 2, 2)] * 9, [(1, 16, 16)]])
def test_features_and_gradients_match_transformers(
    device: torch.device, model: Path, grids: list[tuple[int, int, int]]
) -> None:
    theirs = load_pretrained(model, torch.float32).model.visual.to(device)
    ours = load_pretrained(model, torch.float32).model.visual.to(device)
    optimize_vision_tower(ours)
    array = np.asarray(grids)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(int(array.prod(axis=1).sum()), 1176, generator=generator).to(device)
    expected = theirs(pixels, grid_thw=torch.from_numpy(array).to(device)).pooler_output
    tables = vision_tables(array, load_model_shape(str(model)), device)
    got = ours(pixels, grid_thw=torch.from_numpy(array).to(device), **tables).pooler_output
    # Kernels of a GPU add in other orders.
    torch.testing.assert_close(got, expected, atol=1e-6 if device.type == "cpu" else 1e-5, rtol=1e-5)
    mix = torch.randn(expected.shape, generator=generator).to(device)
    (expected * mix).sum().backward()
    (got * mix).sum().backward()
    own = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(own[name].grad, parameter.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_index_tables_match_transformers(model: Path) -> None:
    from transformers.vision_utils import (
        get_vision_cu_seqlens,
        get_vision_position_ids,
        get_vision_window_index,
    )

    tables = vision_tables(np.asarray(GRIDS), load_model_shape(str(model)), torch.device("cpu"))
    grids = torch.tensor(GRIDS)
    order, windows = get_vision_window_index(grids, 2, 112, 14)
    assert torch.equal(tables["window_index"], order)
    assert torch.equal(tables["cu_window_seqlens"], windows)
    assert torch.equal(tables["position_ids"], get_vision_position_ids(grids, 2))
    assert torch.equal(tables["cu_seqlens"], get_vision_cu_seqlens(grids))
    assert tables["max_window_seqlen"] == 64


@pytest.mark.parametrize(
    ("max_patches", "expected"),
    [
        (0, [(0, 5)]),
        (100, [(0, 5)]),
        (20, [(0, 2), (2, 3), (3, 5)]),  # frame 2 has 64 patches
        (1, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
        (84, [(0, 4), (4, 5)]),
    ],
)
def test_slices_hold_at_most_the_maximum_or_one_frame(max_patches: int, expected: list[tuple[int, int]]) -> None:
    grids = np.array([(1, 2, 4), (1, 2, 4), (1, 8, 8), (1, 2, 2), (1, 2, 4)])
    assert [(part.start, part.stop) for part in slice_frames(grids, max_patches)] == expected


def test_weights_keep_their_names(model: Path) -> None:
    plain, optimized = (load_pretrained(model, torch.float32) for _ in range(2))
    optimize_vision_tower(optimized.model.visual)
    assert optimized.state_dict().keys() == plain.state_dict().keys()
