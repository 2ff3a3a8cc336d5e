"""Pieces of parameters in safetensors files, and the index by which any of their elements are found.

    weights-00000-00000.safetensors     kind, rank that wrote it, number
    exp_avg-00000-00000.safetensors     a tensor under its HF name: in its own shape if the piece is all
    exp_avg_sq-00000-00000.safetensors  of it, else one-dimensional
    index.json                          shapes; for each kind and name: [start, stop, file] of each piece

All are float32, whatever the model computes in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vz_ray.learner.atomic_dir import CheckpointError
from vz_ray.learner.zero_state import ParamSlice

INDEX = "index.json"
_SHARD_BYTES = 1 << 30
"""Most bytes in a file, unless a piece alone has more: what a rank copies to the CPU at a time."""

SliceLocation = tuple[str, str, int, int, str]
"""Kind, name, start, stop, file."""


def write_shards(
    folder: Path,
    rank: int,
    kind: str,
    pieces: Iterable[ParamSlice],
    get: Callable[[ParamSlice, str], Tensor],
    *,
    shard_bytes: int = _SHARD_BYTES,
) -> list[SliceLocation]:
    """Writes pieces of one kind; returns where they are."""
    from safetensors.torch import save_file

    where: list[SliceLocation] = []
    for number, part in enumerate(_parts(pieces, shard_bytes)):
        file = f"{kind}-{rank:05d}-{number:05d}.safetensors"
        tensors = {}
        for piece in part:
            values = get(piece, kind).to(device="cpu", dtype=torch.float32, copy=True)
            tensors[piece.name] = values.view(piece.shape) if piece.is_whole else values
            where.append((kind, piece.name, piece.start, piece.stop, file))
        save_file(tensors, folder / file, metadata={"format": "pt"})
    return where


def write_index(folder: Path, shapes: dict[str, tuple[int, ...]], where: Iterable[SliceLocation]) -> None:
    """Writes the index.

    Raises:
        RuntimeError: An element of a parameter is in no piece, or in several: a bug of whoever cut them.
    """
    pieces: dict[str, dict[str, list[list[Any]]]] = {}
    for kind, name, start, stop, file in where:
        pieces.setdefault(kind, {}).setdefault(name, []).append([start, stop, file])
    for kind, named in pieces.items():
        for name, shape in shapes.items():
            runs = sorted(named.get(name, []))
            edges = [0, *(edge for run in runs for edge in run[:2]), math.prod(shape)]
            if edges[::2] != edges[1::2]:
                raise RuntimeError(
                    f"{kind} of {name} {list(shape)} are cut in {runs}, which is not all of it"
                )
            named[name] = runs
    (folder / INDEX).write_text(json.dumps({"shapes": shapes, "pieces": pieces}))


class ShardReader:
    """What `write_shards` and `write_index` wrote, read by elements; files are mapped, not loaded.

    Attributes:
        shapes: Whole shapes by HF name.

    Raises:
        CheckpointBroken: There is no index.
    """

    def __init__(self, directory: Path) -> None:
        self._folder = directory
        try:
            content = json.loads((directory / INDEX).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"checkpoint {directory} has no readable {INDEX}: {error}") from error
        self.shapes: dict[str, tuple[int, ...]] = {n: tuple(s) for n, s in content["shapes"].items()}
        self._pieces: dict[str, dict[str, list[list[Any]]]] = content["pieces"]
        self._files: dict[str, Any] = {}

    def read(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Float32 elements `[stop - start]` of a parameter that is in `shapes`; by default all of it."""
        stop = math.prod(self.shapes[name]) if stop is None else stop
        found = []
        for first, last, file in self._pieces[kind][name]:
            low, high = max(first, start), min(last, stop)
            if low < high:
                found.append(self._open(file).get_tensor(name).reshape(-1)[low - first : high - first])
        return found[0] if len(found) == 1 else torch.cat(found)

    def _open(self, file: str) -> Any:
        from safetensors import safe_open

        if file not in self._files:
            self._files[file] = safe_open(self._folder / file, "pt")
        return self._files[file]


def check_same_parameters(
    directory: Path, found: dict[str, tuple[int, ...]], ours: dict[str, tuple[int, ...]]
) -> None:
    """Holds the parameters of a checkpoint against those that are trained here.

    Raises:
        CheckpointBroken: Names or shapes differ; names the first that does.
    """
    fix = "resume with the model, the frozen parts and the adapters that it was written with"
    if lost := _first(n for n in ours if n not in found):
        raise CheckpointError(
            f"checkpoint {directory} is of another model: it lacks {lost}, which is trained here: {fix}"
        )
    if extra := _first(n for n in found if n not in ours):
        raise CheckpointError(
            f"checkpoint {directory} is of another model: it holds {extra}, which is not trained here: {fix}"
        )
    if other := _first(n for n in ours if found[n] != ours[n]):
        raise CheckpointError(
            f"checkpoint {directory} is of another model: {other} is {list(found[other])} there and "
            f"{list(ours[other])} here: {fix}"
        )


def _first(names: Iterable[str]) -> str | None:
    return next(iter(names), None)


def _parts(pieces: Iterable[ParamSlice], most: int) -> list[Sequence[ParamSlice]]:
    """Cuts a list in runs of at most `most` bytes of float32, or of one piece."""
    parts: list[list[ParamSlice]] = []
    room = 0
    for piece in pieces:
        size = 4 * (piece.stop - piece.start)
        if not parts or size > room:
            parts.append([])
            room = most
        parts[-1].append(piece)
        room -= size
    return list(parts)
