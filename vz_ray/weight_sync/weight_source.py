"""Sources of weights to publish."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from vz_ray.families import FAMILIES
from vz_ray.utils.errors import UserError
from vz_ray.weight_sync.weight_version import TensorSpec, dtype_name

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class WeightSource(Protocol):
    """All full tensors of a model under the names and in the layout of HF checkpoints, each exactly once.

    Tied tensors appear once, under the name that HF saves (the embedding).
    """

    def specs(self) -> list[TensorSpec]:
        """Return names, dtypes and full shapes without digests. Moves no data."""
        ...

    def buckets(self, max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the tensors in `specs` order, in buckets of at most `max_bytes` or one tensor.

        A bucket is valid until the next one is requested. Under ZeRO-3 each bucket is gathered, so every
        rank must iterate.
        """
        ...


def split_into_buckets(specs: list[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Split `specs` into buckets of at most `max_bytes` or one tensor, in order."""
    buckets: list[list[TensorSpec]] = []
    free_bytes = 0
    for spec in specs:
        if not buckets or spec.nbytes > free_bytes:
            buckets.append([])
            free_bytes = max_bytes
        buckets[-1].append(spec)
        free_bytes -= spec.nbytes
    return buckets


class CollectiveSource:
    """A source whose buckets every rank gathers together, read on one rank.

    If the reader stops early, for example because shared memory is full, the other ranks would wait in the next
    gather, or pair it with a collective of the next step. `gathered_to_the_end` gathers the remaining buckets.

    Args:
        source: The source on this rank.
        max_bytes: Size of a bucket, equal on all ranks.
    """

    def __init__(self, source: WeightSource, max_bytes: int) -> None:
        self._source = source
        self._buckets = source.buckets(max_bytes)

    def specs(self) -> list[TensorSpec]:
        return self._source.specs()

    def buckets(self, max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
        """Return the remaining buckets; their size is that of the constructor."""
        return self._buckets

    @contextmanager
    def gathered_to_the_end(self) -> Iterator[None]:
        """Gather the unread buckets on exit, also after an error."""
        try:
            yield
        finally:
            for _ in self._buckets:
                continue


class StoredLayout:
    """Layout of a module's parameters in HF checkpoints and engines; for some families not that of transformers.

    transformers loads `[E, 2I, H]` experts of Qwen3-VL from files with `[E, H, 2I]`, but does not save them so.

    Args:
        module: HF model; a module without an HF config stores its parameters as they are.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._family = FAMILIES.get(getattr(getattr(module, "config", None), "model_type", ""))

    def is_transposed(self, name: str) -> bool:
        """Return whether checkpoints hold a parameter with its last two dimensions exchanged."""
        return self._family is not None and self._family.is_stored_transposed(name)

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a parameter in checkpoints."""
        return (*shape[:-2], shape[-1], shape[-2]) if self.is_transposed(name) else shape

    def tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a whole parameter as checkpoints hold it, contiguous; a copy if its layout differs."""
        return tensor.transpose(-1, -2).contiguous() if self.is_transposed(name) else tensor


class ModuleSource:
    """Parameters of a plain torch module whose names are HF names.

    Args:
        module: The module.
        dtype: Cast the tensors to this dtype. Default: no cast.
    """

    def __init__(self, module: torch.nn.Module, *, dtype: torch.dtype | None = None) -> None:
        self._module = module
        self._dtype = dtype
        self._layout = StoredLayout(module)

    def specs(self) -> list[TensorSpec]:
        return [
            TensorSpec(
                name, dtype_name(self._dtype or parameter.dtype), self._layout.shape(name, tuple(parameter.shape))
            )
            for name, parameter in self._module.named_parameters()
        ]

    def buckets(self, max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
        parameters = dict(self._module.named_parameters())
        for bucket in split_into_buckets(self.specs(), max_bytes):
            yield {
                spec.name: self._layout.tensor(spec.name, parameters[spec.name].detach().to(self._dtype))
                for spec in bucket
            }


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
