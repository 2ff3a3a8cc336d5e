"""M-RoPE positions against HF for random conversations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.families.hf_configs import build_on_meta, hf_config
from vz_ray.families import FAMILIES
from vz_ray.learner.batch import mrope_positions

PAD = 6


def conversation(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    ids: list[int] = []
    grids = []
    for _ in range(rng.integers(0, 6)):
        rows, columns = rng.integers(1, 6, size=2)
        grids.append((1, 2 * rows, 2 * columns))
        ids += rng.integers(10, 300, size=rng.integers(1, 9)).tolist()
        ids += [PAD] * int(rows * columns)
    ids += rng.integers(10, 300, size=rng.integers(1, 9)).tolist()
    return np.asarray(ids), np.asarray(grids, dtype=np.int64).reshape(-1, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_of_random_conversations_match_transformers(family: str) -> None:
    shape = next(iter(FAMILIES[family].known_shapes.values()))
    hf = build_on_meta(hf_config(shape))
    rng = np.random.default_rng(0)
    for _ in range(300):
        ids, grids = conversation(rng)
        tokens = torch.from_numpy(ids)[None]
        expected, _ = hf.model.get_rope_index(
            tokens, mm_token_type_ids=(tokens == PAD).int(), image_grid_thw=torch.from_numpy(grids)
        )
        assert np.array_equal(mrope_positions(ids, grids, PAD, 2), expected[:, 0].numpy())


def test_adjacent_images_start_after_each_other() -> None:
    ids = np.asarray([9, PAD, PAD, PAD, PAD, PAD, 9])
    grids = np.asarray([[1, 2, 4], [1, 6, 2]])
    temporal, rows, columns = mrope_positions(ids, grids, PAD, 2)
    assert temporal.tolist() == [0, 1, 1, 3, 3, 3, 6]
    assert rows.tolist() == [0, 1, 1, 3, 4, 5, 6]
    assert columns.tolist() == [0, 1, 2, 3, 3, 3, 6]


def test_grids_must_match_the_image_tokens() -> None:
    with pytest.raises(ValueError, match="2 image tokens, but the 1 grids have 4 visual tokens"):
        mrope_positions(np.asarray([9, PAD, PAD]), np.asarray([[1, 4, 4]]), PAD, 2)


def test_positions_of_a_full_length_episode() -> None:
    """128 frames of 128 visual tokens."""
    grids = np.asarray([[1, 16, 32]] * 128)
    ids = np.concatenate([[9] * 5 + [PAD] * 128] * 128 + [[9] * 7])
    positions = mrope_positions(ids, grids, PAD, 2)
    assert positions.max() == positions[:, -1].max() == 128 * (5 + 16) + 6
