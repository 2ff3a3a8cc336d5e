"""Weights in shared memory: what a learner writes, and engines on the same node read.

A version is a directory of bucket files and a manifest. It is written under a
temporary name and then renamed, so that it is complete or absent.
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from blake3 import blake3

from vz_ray.weight_sync.weight_source import WeightSource
from vz_ray.weight_sync.weight_version import (
    TensorLocation,
    TensorSpec,
    WeightManifest,
    dtype_name,
    tensor_bytes,
    tensor_digest,
    torch_dtype,
)

MANIFEST_NAME = "manifest.json"
_ALIGN = 64
_NAME = re.compile(r"v(\d{8})")


class WeightIntegrityError(RuntimeError):
    """Stored or received weights are not the ones that were announced."""


class WeightStore:
    """The versions under one directory, of which the newest `keep` stay.

    Args:
        root: A directory in shared memory; made if it is missing.
        bucket_bytes: Most bytes in one file (a larger tensor gets its own).

    Raises:
        OSError: Not enough shared memory.
    """

    def __init__(self, root: Path | str, *, bucket_bytes: int = 256 << 20, keep: int = 1) -> None:
        self.root = Path(root)
        self._bucket_bytes = bucket_bytes
        self._keep = keep
        self.root.mkdir(parents=True, exist_ok=True)

    def path(self, number: int) -> Path:
        return self.root / f"v{number:08d}"

    def versions(self) -> list[int]:
        """Complete versions, ascending."""
        found = (_NAME.fullmatch(entry.name) for entry in self.root.iterdir())
        return sorted(int(match.group(1)) for match in found if match)

    def write_version(self, number: int, source: WeightSource) -> WeightManifest:
        """Writes the source's tensors as version `number`; returns what was written.

        Raises:
            ValueError: `number` does not increase.
            WeightsBroken: The source did not deliver what its specs announce.
        """
        newest = max(self.versions(), default=-1)
        if number <= newest:
            raise ValueError(f"weight version {number} is not newer than {newest} in {self.root}")
        expected = {spec.name: spec for spec in source.specs()}
        self._check_free_space(sum(spec.nbytes for spec in expected.values()))
        draft = self._create_temp_dir(number)
        placed: list[TensorLocation] = []
        sizes: list[int] = []
        for index, bucket in enumerate(source.buckets(self._bucket_bytes)):
            placed += _write_bucket(draft / f"{index:04d}.bin", index, bucket)
            sizes.append((draft / f"{index:04d}.bin").stat().st_size)
        _check_delivered(expected, placed)
        return self._commit(draft, WeightManifest(number, tuple(placed), tuple(sizes)))

    def install(self, manifest: WeightManifest, buckets: Iterable[bytes | memoryview]) -> Path:
        """Writes a version whose files were fetched from another node; returns its directory.

        Safe to be called by several processes of a node at once.
        """
        if not self.path(manifest.number).exists():
            draft = self._create_temp_dir(manifest.number)
            for index, data in enumerate(buckets):
                if len(data) != manifest.bucket_bytes[index]:
                    raise WeightIntegrityError(
                        f"bucket {index} of weight version {manifest.number} came with {len(data)} bytes, "
                        f"announced with {manifest.bucket_bytes[index]}"
                    )
                (draft / f"{index:04d}.bin").write_bytes(data)
            try:
                self._commit(draft, manifest)
            except OSError:
                shutil.rmtree(draft, ignore_errors=True)
                if not self.path(manifest.number).exists():
                    raise
        return self.path(manifest.number)

    def load_manifest(self, number: int) -> WeightManifest:
        return read_manifest(self.path(number))

    def bucket_files(self, number: int) -> list[Path]:
        return sorted(self.path(number).glob("*.bin"))

    def clear(self) -> None:
        """Removes every version."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _create_temp_dir(self, number: int) -> Path:
        draft = self.root / f".draft-{number:08d}-{os.getpid()}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        return draft

    def _commit(self, draft: Path, manifest: WeightManifest) -> WeightManifest:
        (draft / MANIFEST_NAME).write_text(manifest.to_json())
        draft.rename(self.path(manifest.number))
        for old in self.versions()[: -self._keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        return manifest

    def _check_free_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.root).free
        if needed > free:
            raise OSError(
                f"{self.root} has {free / 1e9:.1f} GB free and a weight version needs {needed / 1e9:.1f} GB: "
                "enlarge shared memory, or put weights.shm_dir elsewhere"
            )


def _write_bucket(file: Path, index: int, bucket: dict[str, torch.Tensor]) -> list[TensorLocation]:
    placed = []
    with file.open("wb") as out:
        for name, tensor in bucket.items():
            out.write(b"\0" * (-out.tell() % _ALIGN))
            here = out.tell()
            whole = tensor.detach().cpu().contiguous()
            out.write(tensor_bytes(whole))
            spec = TensorSpec(name, dtype_name(whole.dtype), tuple(whole.shape), tensor_digest(whole))
            placed.append(TensorLocation(spec, index, here))
    return placed


def _check_delivered(expected: dict[str, TensorSpec], placed: list[TensorLocation]) -> None:
    seen = {item.spec.name: item.spec for item in placed}
    if missing := sorted(expected.keys() - seen.keys()):
        raise WeightIntegrityError(f"the source announced but did not deliver {', '.join(missing[:3])}")
    if extra := sorted(seen.keys() - expected.keys()):
        raise WeightIntegrityError(f"the source delivered but did not announce {', '.join(extra[:3])}")
    for name, spec in seen.items():
        if (spec.dtype, spec.shape) != (expected[name].dtype, expected[name].shape):
            raise WeightIntegrityError(
                f"{name} came as {spec.dtype}{list(spec.shape)}, "
                f"announced as {expected[name].dtype}{list(expected[name].shape)}"
            )


def read_manifest(directory: Path | str) -> WeightManifest:
    """The manifest of the version in `directory`."""
    file = Path(directory) / MANIFEST_NAME
    if not file.is_file():
        raise WeightIntegrityError(f"{directory} holds no complete weight version")
    return WeightManifest.from_json(file.read_text())


def read_tensors(directory: Path | str, manifest: WeightManifest) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in order, mapped, not copied, each checked against its digest.

    Raises:
        WeightsBroken: A file is short, or bytes are not those of the manifest.
    """
    mapped: dict[int, mmap.mmap] = {}
    for item in manifest.tensors:
        if item.bucket not in mapped:
            mapped = {item.bucket: _map(Path(directory) / f"{item.bucket:04d}.bin")}
        data = memoryview(mapped[item.bucket])[item.offset : item.offset + item.spec.nbytes]
        found = blake3(data, max_threads=blake3.AUTO).hexdigest()
        if found != item.spec.digest:
            raise WeightIntegrityError(
                f"{item.spec.name} of weight version {manifest.number} in {directory} "
                f"has digest {found[:12]}, announced as {item.spec.digest[:12]}"
            )
        flat = torch.frombuffer(data, dtype=torch_dtype(item.spec.dtype))
        yield item.spec.name, flat.reshape(item.spec.shape)


def _map(file: Path) -> mmap.mmap:
    with file.open("rb") as opened:
        # A private writable mapping: torch warns about read-only buffers, and nobody writes.
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
