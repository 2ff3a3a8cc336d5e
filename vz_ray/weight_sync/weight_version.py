"""Identity and layout of a set of weights: checksum, manifest, update message."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from blake3 import blake3

ADAPTER_PARTS = (".lora_A.weight", ".lora_B.weight")
"""Ends of the names of an adapter's tensors A `[r, in]` and B `[out, r]`, after the HF name of their layer."""


@dataclass(frozen=True, slots=True)
class ProbeScore:
    """Score of a probe by an engine or the learner.

    Attributes:
        num_prompt_tokens: Prompt tokens, including visual tokens.
        logprobs: `[T]`, log-probs of the probe's tokens at temperature 1.
    """

    num_prompt_tokens: int
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """Description of a new version, sent to every engine.

    Attributes:
        version: Number of the weight version.
        checksum: Checksum of all tensors; empty if the transport does not hash (NCCL, IPC).
        transfer_info: `update_info` of the vLLM transfer backend.
        nbytes: Size of the weights.
        probe_score: The learner's score of the parity probe; None if this version is not probed.
        node_id: Ray node that holds `transfer_info["directory"]`; empty for the driver's node.
        in_parts: Whether engines receive the parts of `WeightTransport.parts` instead of `transfer_info`.
    """

    version: int
    checksum: str
    transfer_info: dict[str, Any]
    nbytes: int
    probe_score: ProbeScore | None = None
    node_id: str = ""
    in_parts: bool = False

    @property
    def is_pull(self) -> bool:
        """Whether engines read the weights from a directory instead of a broadcast."""
        return "directory" in self.transfer_info


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Metadata of one tensor.

    Attributes:
        name: Name in the HF checkpoint, for example `model.language_model.norm.weight`.
        dtype: torch dtype without the `torch.` prefix.
        shape: Full shape, not the shape of a shard.
        digest: blake3 of the bytes, hex; empty if not computed yet.
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
    """Position of a tensor: index of the bucket file and byte offset in it."""

    spec: TensorSpec
    bucket: int
    offset: int


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """All tensors of a version with their locations.

    Raises:
        ValueError: A tensor name occurs twice.
    """

    number: int
    tensors: tuple[TensorLocation, ...]
    bucket_bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        names = [location.spec.name for location in self.tensors]
        if len(set(names)) < len(names):
            duplicates = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"weight version {self.number} has {duplicates[0]} (and {len(duplicates) - 1} more) twice")

    @property
    def checksum(self) -> str:
        """Return the checksum of all tensors; see `weights_checksum`."""
        return weights_checksum([location.spec for location in self.tensors])

    @property
    def nbytes(self) -> int:
        return sum(location.spec.nbytes for location in self.tensors)

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
    """Return the blake3 over names, dtypes, shapes and bytes of all tensors, independent of their order, hex."""
    digest = blake3()
    for spec in sorted(specs, key=lambda spec: spec.name):
        digest.update(f"{spec.name}|{spec.dtype}|{list(spec.shape)}|{spec.digest}\n".encode())
    return digest.hexdigest()


def torch_dtype(name: str) -> torch.dtype:
    """Convert `float32` to `torch.float32`."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a torch dtype")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Convert `torch.float32` to `float32`."""
    return str(dtype).removeprefix("torch.")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the blake3 of a contiguous CPU tensor, hex."""
    return blake3(tensor_bytes(tensor), max_threads=blake3.AUTO).hexdigest()
