"""What a set of weights is called, and how to tell two sets apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from blake3 import blake3


@dataclass(frozen=True, slots=True)
class WeightVersion:
    """Attributes:
    number: Increases with every publish.
    checksum: blake3 over names, types, shapes and bytes of all tensors, hex.
    """

    number: int
    checksum: str

    def __str__(self) -> str:
        return f"{self.number} ({self.checksum[:12]})"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a model, under its HF name.

    Attributes:
        name: As in an HF checkpoint, for example `model.language_model.norm.weight`.
        dtype: As torch prints it, without `torch.`.
        shape: Whole, not this rank's part.
        digest: blake3 of the bytes, hex; empty where it is not known yet.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str = ""

    @property
    def nbytes(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count * torch_dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """Where a tensor lies: `bucket` and the byte `offset` in it."""

    spec: TensorSpec
    bucket: int
    offset: int


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """A whole set of weights: every tensor, and where it lies."""

    number: int
    tensors: tuple[TensorLocation, ...]
    bucket_bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        names = [placed.spec.name for placed in self.tensors]
        twice = (
            sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        )
        if twice:
            raise ValueError(f"weight version {self.number} has {twice[0]} (and {len(twice) - 1} more) twice")

    @property
    def version(self) -> WeightVersion:
        return WeightVersion(self.number, weights_checksum([placed.spec for placed in self.tensors]))

    @property
    def nbytes(self) -> int:
        return sum(placed.spec.nbytes for placed in self.tensors)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WeightManifest:
        raw: dict[str, Any] = json.loads(text)
        tensors = tuple(
            TensorLocation(
                TensorSpec(**{**item["spec"], "shape": tuple(item["spec"]["shape"])}),
                item["bucket"],
                item["offset"],
            )
            for item in raw["tensors"]
        )
        return cls(raw["number"], tensors, tuple(raw["bucket_bytes"]))


def weights_checksum(specs: Sequence[TensorSpec]) -> str:
    """blake3 over all tensors, whatever their order; hex."""
    digest = blake3()
    for spec in sorted(specs, key=lambda spec: spec.name):
        digest.update(f"{spec.name}|{spec.dtype}|{list(spec.shape)}|{spec.digest}\n".encode())
    return digest.hexdigest()


def torch_dtype(name: str) -> torch.dtype:
    """`float32` -> `torch.float32`."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a torch dtype")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> `float32`."""
    return str(dtype).removeprefix("torch.")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def tensor_digest(tensor: torch.Tensor) -> str:
    """blake3 of a contiguous CPU tensor's bytes, hex."""
    return blake3(tensor_bytes(tensor), max_threads=blake3.AUTO).hexdigest()
