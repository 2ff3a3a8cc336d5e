"""MLPs computed in tiles of tokens against whole MLPs: loss, gradients, number of computations, dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.learner.test_shared_prefix import TOLERANCE, GradientCheck, assert_equal, remove_float32_rounding
from vz_ray.config.learner import LoraConfig
from vz_ray.learner.lora import add_adapters
from vz_ray.learner.tiled_mlp import tile_mlps, tiled_modules

TILE = 50


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_tiles_keep_loss_and_gradient(
    family_model: Path, dtype: torch.dtype, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_float32_rounding(monkeypatch)
    whole = GradientCheck(family_model, dtype)
    tiled = GradientCheck(family_model, dtype, checkpointing=checkpointing, tile_tokens=TILE)
    assert len(tiled_modules(tiled.policy)) == tiled.policy.shape.text.layers
    assert_equal(tiled.run_shared(), whole.run_shared(), TOLERANCE[dtype])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_tile_is_computed_twice(family_model: Path, checkpointing: bool) -> None:
    """Once forward and once backward, with recomputed layers too."""
    check = GradientCheck(family_model, torch.float32, checkpointing=checkpointing, tile_tokens=TILE)
    lengths: list[int] = []
    mlp = check.policy.hf.model.language_model.layers[0].mlp
    # The first submodule of an MLP or of experts.
    next(mlp.children()).register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].numel()))
    check.run_shared()
    hidden = check.policy.shape.text.hidden
    assert max(lengths) == TILE * hidden
    tiles = len(lengths) // 2
    assert tiles > 3
    assert lengths[:tiles] == lengths[tiles:]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adapters_get_the_gradient_of_their_forward_pass(model: Path, dropout: float) -> None:
    """With dropout, the second computation of a tile drops the same inputs as the first."""
    results, random_after = [], []
    for compute in (_loop_over_tiles, tile_mlps):
        check = GradientCheck(model, torch.float64, checkpointing=True)
        compute(check.policy.hf.model.language_model, TILE)
        add_adapters(check.policy.hf, LoraConfig(rank=4, dropout=dropout), str(model), seed=0)
        for name, parameter in check.policy.hf.named_parameters():
            if ".lora_B." in name:  # initially 0
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(1)
        results.append(check.run_shared())
        random_after.append(float(torch.rand(1)))
    assert_equal(results[1], results[0], 1e-9)
    assert random_after[0] == random_after[1]


def _loop_over_tiles(text: Any, max_tokens: int) -> None:
    """Compute tiles one after another, as autograd differentiates them by itself."""
    for layer in text.layers:

        def forward(hidden: torch.Tensor, compute: Any = layer.mlp.forward) -> torch.Tensor:
            return torch.cat([compute(tile) for tile in hidden.split(max_tokens, dim=-2)], dim=-2)

        layer.mlp.forward = forward


def test_weight_gradients_add_in_float32(model: Path) -> None:
    """In bfloat16 the sum over tiles is rounded once: as close to float64 as one matrix product."""
    exact = GradientCheck(model, torch.float64).policy.hf.model.language_model.layers[0].mlp
    torch.manual_seed(0)
    hidden = torch.randn(1, 2048, exact.hidden_size, dtype=torch.bfloat16).abs()
    exact(hidden.double()).sum().backward()
    errors = []
    for tile in (0, 8):
        policy = GradientCheck(model, torch.bfloat16, tile_tokens=tile).policy
        mlp = policy.hf.model.language_model.layers[0].mlp
        mlp(hidden).sum().backward()
        gradient, target = mlp.down_proj.weight.grad.double(), exact.down_proj.weight.grad
        errors.append(float((gradient - target).norm() / target.norm()))
    assert errors[1] <= 1.1 * errors[0]
