"""Files of a checkpoint: an atomic, hashed directory and float32 parameter slices in safetensors files.

    staging_dir --> all ranks write files --> commit: hash, flush, write the manifest, rename

    manifest.json                       hashes of all files and of the manifest itself
    index.json                          shapes; for each kind and name: [start, stop, file] of each slice
    weights-00000-00000.safetensors     kind, rank, file number
    exp_avg-00000-00000.safetensors     tensors under their HF names: whole parameters keep their shape,
    exp_avg_sq-00000-00000.safetensors  slices are one-dimensional

A directory under its final name is complete. The hashes detect damage and manual edits; they are not a
signature.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from vz_ray.learner.distributed import RankInfo, fail_together
from vz_ray.learner.zero_state import ParamSlice
from vz_ray.utils.atomic_files import sync_directory, write_atomic
from vz_ray.utils.errors import UserError

MANIFEST, INDEX = "manifest.json", "index.json"
_SHARD_BYTES = 1 << 30
"""Maximum bytes per file, unless one slice is larger: the amount that a rank copies to the CPU at a time."""

SliceLocation = tuple[str, str, int, int, str]
"""Kind, name, start, stop, file."""


class CheckpointError(UserError):
    """A checkpoint is incomplete, damaged, or belongs to another model."""


@contextlib.contextmanager
def staging_dir(directory: Path, rank_info: RankInfo) -> Iterator[Path]:
    """Yield an empty directory beside `directory` to fill and `commit`; every rank must enter.

    A failed block deletes it. Leftovers of a killed process are deleted by the next block.

    Raises:
        FileExistsError: `directory` already exists.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} already exists. Choose another directory.")
    staging = directory.with_name(f".{directory.name}.staging")
    with fail_together(rank_info, f"creating {staging}"):
        if rank_info.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
    try:
        yield staging
    except BaseException:
        if rank_info.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file of PyTorch tensors.

    Raises:
        OSError: The file cannot be written; has `errno` and `filename`, unlike safetensors' own error.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if (code := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def fsync_and_hash(path: Path) -> str:
    """Flush a file to disk and return the hash of its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return _hash_file(path)


def commit(
    staging: Path, final: Path, metadata: Mapping[str, Any], known_hashes: Mapping[str, str] | None = None
) -> None:
    """Flush all files of `staging`, write the manifest, and rename the directory to `final`.

    Args:
        metadata: Content of the manifest besides the hashes.
        known_hashes: Hashes by file name, for files already passed to `fsync_and_hash`.
    """
    hashes = dict(known_hashes or {})
    for path in sorted(path for path in staging.rglob("*") if path.is_file()):
        name = str(path.relative_to(staging))
        if name not in hashes:
            hashes[name] = fsync_and_hash(path)
    content = {"metadata": metadata, "files": hashes}
    manifest = content | {"manifest_hash": _hash_json(content)}
    write_atomic(staging / MANIFEST, json.dumps(manifest, indent=1).encode())
    for folder in [staging, *(path for path in staging.rglob("*") if path.is_dir())]:
        sync_directory(folder)
    staging.rename(final)
    sync_directory(final.parent)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest: `metadata` and `files`.

    Raises:
        CheckpointError: The manifest is missing or was changed.
    """
    file = directory / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{directory} has no {MANIFEST}: no complete checkpoint was written there")
    try:
        content = json.loads(file.read_text())
        intact = content.pop("manifest_hash") == _hash_json(content)
    except (ValueError, KeyError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise CheckpointError(f"{MANIFEST} of checkpoint {directory} does not match its hash. Use another checkpoint.")
    return dict(content)


def verify_files(directory: Path, rank_info: RankInfo) -> None:
    """Check every file against its hash; the ranks share the work, and every rank must call.

    Raises:
        CheckpointError: The manifest or a file is missing, or a file was changed; raised on all ranks.
    """
    with fail_together(rank_info, f"verifying {directory}"):
        files = sorted(read_manifest(directory)["files"].items())
        for name, expected in files[rank_info.rank :: rank_info.world_size]:
            path = directory / name
            if not path.is_file():
                raise CheckpointError(f"checkpoint {directory} lacks {name}. Use another checkpoint.")
            if _hash_file(path) != expected:
                raise CheckpointError(
                    f"{name} of checkpoint {directory} is damaged: its hash differs from the manifest. "
                    "Use another checkpoint."
                )


def write_shards(
    directory: Path,
    rank: int,
    kind: str,
    slices: Iterable[ParamSlice],
    read: Callable[[ParamSlice, str], Tensor],
    *,
    shard_bytes: int = _SHARD_BYTES,
) -> list[SliceLocation]:
    """Write the slices of one kind as float32 and return their locations."""
    locations: list[SliceLocation] = []
    for number, shard in enumerate(_split_into_shards(slices, shard_bytes)):
        file = f"{kind}-{rank:05d}-{number:05d}.safetensors"
        tensors = {}
        for param in shard:
            values = read(param, kind).to(device="cpu", dtype=torch.float32, copy=True)
            tensors[param.name] = values.view(param.shape) if param.is_whole else values
            locations.append((kind, param.name, param.start, param.stop, file))
        write_safetensors(tensors, directory / file)
    return locations


def write_index(directory: Path, shapes: dict[str, tuple[int, ...]], locations: Iterable[SliceLocation]) -> None:
    """Write the index of all slices.

    Raises:
        RuntimeError: The slices of a parameter overlap or leave a gap.
    """
    slices: dict[str, dict[str, list[list[Any]]]] = {}
    for kind, name, start, stop, file in locations:
        slices.setdefault(kind, {}).setdefault(name, []).append([start, stop, file])
    for kind, by_name in slices.items():
        for name, shape in shapes.items():
            ranges = sorted(by_name.get(name, []))
            edges = [0, *(edge for item in ranges for edge in item[:2]), math.prod(shape)]
            if edges[::2] != edges[1::2]:
                raise RuntimeError(f"{kind} of {name} {list(shape)} have slices {ranges}, which overlap or leave a gap")
            by_name[name] = ranges
    (directory / INDEX).write_text(json.dumps({"shapes": shapes, "slices": slices}))


class ShardReader:
    """Reads elements from the files of `write_shards`; files are memory-mapped, not loaded.

    Attributes:
        shapes: Whole shapes by HF name.

    Raises:
        CheckpointError: The index is missing or unreadable.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            content = json.loads((directory / INDEX).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"checkpoint {directory} has no readable {INDEX}: {error}") from error
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in content["shapes"].items()}
        self._slices: dict[str, dict[str, list[list[Any]]]] = content["slices"]
        self._files: dict[str, Any] = {}

    def read(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the float32 elements `[stop - start]` of a parameter; by default all elements."""
        stop = math.prod(self.shapes[name]) if stop is None else stop
        parts = []
        for first, last, file in self._slices[kind][name]:
            low, high = max(first, start), min(last, stop)
            if low < high:
                parts.append(self._open(file).get_tensor(name).reshape(-1)[low - first : high - first])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _open(self, file: str) -> Any:
        from safetensors import safe_open

        if file not in self._files:
            self._files[file] = safe_open(self._directory / file, "pt")
        return self._files[file]


def check_same_parameters(
    directory: Path, saved: dict[str, tuple[int, ...]], trained: dict[str, tuple[int, ...]]
) -> None:
    """Compare the parameters of a checkpoint with the trained parameters of this run.

    Raises:
        CheckpointError: Names or shapes differ; names the first difference.
    """
    differences = [
        *(f"it lacks {name}, which is trained here" for name in trained if name not in saved),
        *(f"it holds {name}, which is not trained here" for name in saved if name not in trained),
        *(
            f"{name} has shape {list(saved[name])} there and {list(shape)} here"
            for name, shape in trained.items()
            if name in saved and saved[name] != shape
        ),
    ]
    if differences:
        raise CheckpointError(
            f"checkpoint {directory} belongs to another model: {differences[0]}; resume with the model, frozen "
            "parts and adapters of the run that wrote it"
        )


def _hash_file(path: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def _hash_json(content: Mapping[str, Any]) -> str:
    return blake3(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _split_into_shards(slices: Iterable[ParamSlice], max_bytes: int) -> list[Sequence[ParamSlice]]:
    """Group slices into shards of at most `max_bytes` of float32, or of one larger slice."""
    shards: list[list[ParamSlice]] = []
    free_bytes = 0
    for param in slices:
        size = 4 * (param.stop - param.start)
        if not shards or size > free_bytes:
            shards.append([])
            free_bytes = max_bytes
        shards[-1].append(param)
        free_bytes -= size
    return list(shards)
