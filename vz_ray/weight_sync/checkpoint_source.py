"""Weight source for a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vz_ray.utils.errors import UserError
from vz_ray.weight_sync.weight_source import split_into_buckets
from vz_ray.weight_sync.weight_version import TensorSpec

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class CheckpointSource:
    """`WeightSource` for a Hugging Face checkpoint directory.

    Reads only the file headers until `buckets` is called.

    Raises:
        UserError: The directory has no safetensors file, a file is corrupt, or a tensor occurs twice.
    """

    def __init__(self, directory: Path | str) -> None:
        self._files: dict[str, Path] = {}
        self._specs: list[TensorSpec] = []
        files = sorted(Path(directory).glob("*.safetensors"))
        if not files:
            raise UserError(f"{directory} has no *.safetensors; pass a checkpoint directory")
        for file in files:
            with _open_safetensors(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    self._add(name, file, tensors.get_slice(name))

    def _add(self, name: str, file: Path, head: Any) -> None:
        if name in self._files:
            raise UserError(f"{name} is in both {self._files[name]} and {file}")
        if head.get_dtype() not in _DTYPES:
            raise UserError(f"{name} in {file} is {head.get_dtype()}; it must be one of {', '.join(_DTYPES)}")
        self._files[name] = file
        self._specs.append(TensorSpec(name, _DTYPES[head.get_dtype()], tuple(head.get_shape())))

    def specs(self) -> list[TensorSpec]:
        return list(self._specs)

    def buckets(self, max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
        for bucket in split_into_buckets(self._specs, max_bytes):
            tensors: dict[str, torch.Tensor] = {}
            for file in dict.fromkeys(self._files[spec.name] for spec in bucket):
                with _open_safetensors(file) as opened:
                    names = [spec.name for spec in bucket if self._files[spec.name] == file]
                    tensors |= {name: opened.get_tensor(name) for name in names}
            yield {spec.name: tensors[spec.name] for spec in bucket}


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is not a complete safetensors file: {error}") from error
