"""MLPs of the text layers, computed for a limited number of tokens at a time.

An MLP treats tokens separately, but its intermediates are several times wider than the hidden states and dominate the
memory of a layer. Here they exist for one tile of tokens, forward and backward: the backward pass computes each tile
again (ALST, arXiv 2506.13996). Experts are computed in tiles too: a token's experts depend on this token only.

DeepSpeed's `TiledMLP` is not used. Its backward pass runs the hooks of weights and submodules for each tile, so that
ranks must agree on the number of tiles, and it adds weight gradients in the dtype of the weights. Here autograd sees
one operation: a weight has one gradient, summed over tiles in at least float32. With gradient checkpointing, the
recomputation of a layer stops before the MLP, so that tiles cost no further forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import get_device_states, set_device_states

from vz_ray.learner.attention import accumulation_dtype

Compute = Callable[[Tensor], Tensor]
"""The MLP of some tokens, `[..., T, H] -> [..., T, H]`."""


def tile_mlps(text: Any, max_tokens: int) -> None:
    """Compute the MLPs of an HF text model in tiles of at most `max_tokens` tokens; weights keep their names."""
    for layer in text.layers:
        layer.mlp.forward = _TiledForward(layer.mlp, layer.mlp.forward, max_tokens)


def tiled_modules(module: nn.Module) -> list[nn.Module]:
    """Return the MLPs that are computed in tiles.

    ZeRO-3 must gather the weights of each as a whole (a leaf module of DeepSpeed): tiles then need no collectives.
    """
    return [part for part in module.modules() if isinstance(vars(part).get("forward"), _TiledForward)]


@dataclass(frozen=True)
class _TiledForward:
    """Forward function of `mlp`, whose own one is `compute`."""

    mlp: nn.Module
    compute: Compute
    max_tokens: int

    def __call__(self, hidden: Tensor) -> Tensor:
        if hidden.shape[-2] <= self.max_tokens:
            return self.compute(hidden)
        trained = [parameter for parameter in self.mlp.parameters() if parameter.requires_grad]
        tiles = _Tiles(self.compute, self.max_tokens, trained, hidden)
        result: Tensor = _ComputeTiles.apply(_SaveInput.apply(hidden, tiles, *trained), tiles)
        return result


class _Tiles:
    """One pass of an MLP: its function, its trained weights, and the random state before it.

    The random state makes the dropout of adapters equal when a tile is computed again.
    """

    def __init__(self, compute: Compute, max_tokens: int, trained: list[nn.Parameter], hidden: Tensor) -> None:
        self.compute, self.max_tokens, self.trained = compute, max_tokens, trained
        self.with_gradient = torch.is_grad_enabled()
        self._cpu_state, self._device_states = torch.get_rng_state(), get_device_states(hidden)

    def parts(self, hidden: Tensor) -> list[slice]:
        """Return the token ranges of the tiles."""
        length = hidden.shape[-2]
        return [slice(start, min(start + self.max_tokens, length)) for start in range(0, length, self.max_tokens)]

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Use the random state before the pass, and restore the current one at the end."""
        devices, states = self._device_states
        with torch.random.fork_rng(devices):
            torch.set_rng_state(self._cpu_state)
            set_device_states(devices, states)
            yield


class _SaveInput(torch.autograd.Function):
    """`(hidden, tiles, *trained weights) -> hidden`. The backward pass computes the tiles again.

    It maps the gradient of the MLP's output to those of `hidden` and the weights. The input is saved before the tiles
    are computed: gradient checkpointing recomputes a layer until the last saved tensor, and so without the tiles.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tiles: _Tiles, *trained: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.tiles = tiles
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,), tiles = ctx.saved_tensors, ctx.tiles
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        sums: list[Tensor | None] = [None] * len(tiles.trained)
        with tiles.replay():
            for part in tiles.parts(hidden):
                tile = hidden[..., part, :].detach().requires_grad_(grad_hidden is not None)
                with torch.enable_grad():
                    output = tiles.compute(tile)
                inputs = [tile, *tiles.trained] if grad_hidden is not None else tiles.trained
                gradients = list(torch.autograd.grad(output, inputs, grads[0][..., part, :], allow_unused=True))
                if grad_hidden is not None:
                    grad_hidden[..., part, :] = gradients.pop(0)
                for index, gradient in enumerate(gradients):
                    sums[index] = _add(sums[index], gradient)
        weights = zip(sums, tiles.trained, strict=True)
        return grad_hidden, None, *(None if total is None else total.to(weight.dtype) for total, weight in weights)


def _add(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """Add a tile's gradient in at least float32."""
    if gradient is None:
        return total
    if total is None:
        return gradient.to(accumulation_dtype(gradient.dtype))
    return total.add_(gradient)


def _refuse(_: Any) -> Tensor:
    raise RuntimeError("the tiles of a forward pass save no tensors; the backward pass computes them again")


class _ComputeTiles(torch.autograd.Function):
    """`(hidden, tiles) -> output of the MLP`; passes the output's gradient to `_SaveInput`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tiles: _Tiles) -> Tensor:
        output = torch.empty_like(hidden)
        # Adapters have dropout only if gradients are enabled. Tensors that the tiles save are not used: gradient
        # checkpointing, which counts saved tensors by hooks, must not see them.
        with torch.set_grad_enabled(tiles.with_gradient), saved_tensors_hooks(lambda _: None, _refuse):
            for part in tiles.parts(hidden):
                output[..., part, :] = tiles.compute(hidden[..., part, :].detach()).detach()
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
