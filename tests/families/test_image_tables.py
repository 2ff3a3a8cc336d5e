"""Index tables of the vision towers against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import vision_utils

from vz_ray.families import FAMILIES

# One window, several with partial edges, tall, wide; repeated and mixed.
GRIDS = [(1, 2, 2), (1, 2, 2), (1, 12, 20), (1, 6, 2), (1, 8, 8), (1, 2, 2), (1, 2, 22), (1, 62, 48)]


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_match_transformers_bit_for_bit(family: str) -> None:
    vision = next(iter(FAMILIES[family].known_shapes.values())).vision
    tables = FAMILIES[family].image_tables(np.asarray(GRIDS), vision)
    grids = torch.tensor(GRIDS)
    expected = {
        "position_ids": vision_utils.get_vision_position_ids(grids, 2),
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(grids),
        "max_seqlen": 62 * 48,
    }
    if vision.window_size:
        order, windows = vision_utils.get_vision_window_index(grids, 2, vision.window_size, vision.patch_size)
        expected |= {"window_index": order, "cu_window_seqlens": windows, "max_window_seqlen": 64}
    if vision.position_table:
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grids, num_grid_per_side=48, align_corners=True, spatial_merge_size=2
        )
        expected |= {"interp_indices": indices, "interp_weights": weights}
    assert tables.keys() == expected.keys()
    for name, table in tables.items():
        np.testing.assert_array_equal(table, np.asarray(expected[name]), err_msg=name)
