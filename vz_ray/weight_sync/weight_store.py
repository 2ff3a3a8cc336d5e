"""Store of weight versions in shared memory, written by a learner and read by engines on the node.

A version is a directory with bucket files and a manifest. It is written under a temporary name and
renamed, so it is either complete or absent.
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
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
    """Stored or received weights differ from their manifest or announcement."""


class WeightStore:
    """The newest weight version, in one directory. Older versions are deleted.

    Args:
        root: Directory in shared memory; created if missing.
        bucket_bytes: Maximum file size. A larger tensor gets its own file.

    Raises:
        OSError: Not enough shared memory.
    """

    def __init__(self, root: Path | str, *, bucket_bytes: int = 256 << 20) -> None:
        self.root = Path(root)
        self._bucket_bytes = bucket_bytes
        self.root.mkdir(parents=True, exist_ok=True)

    def path(self, number: int) -> Path:
        return self.root / f"v{number:08d}"

    def versions(self) -> list[int]:
        """Return the numbers of the complete versions, ascending."""
        matches = (_NAME.fullmatch(entry.name) for entry in self.root.iterdir())
        return sorted(int(match.group(1)) for match in matches if match)

    def write_version(self, number: int, source: WeightSource) -> WeightManifest:
        """Write the source's tensors as version `number`; an incomplete version is deleted.

        Raises:
            ValueError: `number` is not newer than the newest version.
            WeightIntegrityError: The source's tensors do not match its specs.
            OSError: Not enough shared memory.
        """
        newest = max(self.versions(), default=-1)
        if number <= newest:
            raise ValueError(f"weight version {number} is not newer than {newest} in {self.root}")
        expected = {spec.name: spec for spec in source.specs()}
        self._check_free_space(sum(spec.nbytes for spec in expected.values()))
        temp_dir = self._create_temp_dir(number)
        locations: list[TensorLocation] = []
        sizes: list[int] = []
        try:
            for index, bucket in enumerate(source.buckets(self._bucket_bytes)):
                locations += _write_bucket(temp_dir / f"{index:04d}.bin", index, bucket)
                sizes.append((temp_dir / f"{index:04d}.bin").stat().st_size)
            _check_delivered(expected, locations)
            return self._commit(temp_dir, WeightManifest(number, tuple(locations), tuple(sizes)))
        except BaseException:
            # Shared memory is scarce: without the draft, the next version may fit.
            shutil.rmtree(temp_dir, ignore_errors=True)
            raise

    def stage_bucket(self, manifest: WeightManifest, index: int, data: bytes | memoryview) -> None:
        """Write a bucket of a version that is fetched from another node; bucket 0 starts over.

        Raises:
            WeightIntegrityError: The bucket has another size than announced.
            OSError: Not enough shared memory.
        """
        if len(data) != manifest.bucket_bytes[index]:
            raise WeightIntegrityError(
                f"bucket {index} of weight version {manifest.number} has {len(data)} bytes; "
                f"the manifest announces {manifest.bucket_bytes[index]}"
            )
        if index == 0:
            self._delete_abandoned_drafts()
            self._check_free_space(sum(manifest.bucket_bytes))
            self._create_temp_dir(manifest.number)
        (self._draft(manifest.number) / f"{index:04d}.bin").write_bytes(data)

    def commit_staged(self, manifest: WeightManifest) -> Path:
        """Complete a version whose buckets are staged, and return its directory."""
        draft, path = self._draft(manifest.number), self.path(manifest.number)
        if path.exists():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            self._commit(draft, manifest)
        return path

    def clear(self) -> None:
        """Delete all versions."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _draft(self, number: int) -> Path:
        return self.root / f".draft-{number:08d}-{os.getpid()}"

    def _delete_abandoned_drafts(self) -> None:
        """Delete the drafts of processes that have ended."""
        for draft in self.root.glob(".draft-*"):
            if not psutil.pid_exists(int(draft.name.rpartition("-")[2])):
                shutil.rmtree(draft, ignore_errors=True)

    def _create_temp_dir(self, number: int) -> Path:
        temp_dir = self._draft(number)
        shutil.rmtree(temp_dir, ignore_errors=True)
        temp_dir.mkdir()
        return temp_dir

    def _commit(self, temp_dir: Path, manifest: WeightManifest) -> WeightManifest:
        (temp_dir / MANIFEST_NAME).write_text(manifest.to_json())
        temp_dir.rename(self.path(manifest.number))
        for old in self.versions()[:-1]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        return manifest

    def _check_free_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.root).free
        if needed > free:
            raise OSError(
                f"{self.root} has {free / 1e9:.1f} GB free; a weight version needs {needed / 1e9:.1f} GB. "
                "Enlarge shared memory or set weights.shm_dir to a larger disk."
            )


def _write_bucket(file: Path, index: int, bucket: dict[str, torch.Tensor]) -> list[TensorLocation]:
    locations = []
    with file.open("wb") as out:
        for name, tensor in bucket.items():
            out.write(b"\0" * (-out.tell() % _ALIGN))
            offset = out.tell()
            contiguous = tensor.detach().cpu().contiguous()
            out.write(tensor_bytes(contiguous))
            spec = TensorSpec(name, dtype_name(contiguous.dtype), tuple(contiguous.shape), tensor_digest(contiguous))
            locations.append(TensorLocation(spec, index, offset))
    return locations


def _check_delivered(expected: dict[str, TensorSpec], locations: list[TensorLocation]) -> None:
    written = {location.spec.name: location.spec for location in locations}
    if missing := sorted(expected.keys() - written.keys()):
        raise WeightIntegrityError(f"the source announced but did not deliver {', '.join(missing[:3])}")
    if extra := sorted(written.keys() - expected.keys()):
        raise WeightIntegrityError(f"the source delivered but did not announce {', '.join(extra[:3])}")
    for name, spec in written.items():
        if (spec.dtype, spec.shape) != (expected[name].dtype, expected[name].shape):
            raise WeightIntegrityError(
                f"{name} was delivered as {spec.dtype}{list(spec.shape)} "
                f"but announced as {expected[name].dtype}{list(expected[name].shape)}"
            )


def read_manifest(directory: Path | str) -> WeightManifest:
    """Read the manifest of the version in `directory`."""
    file = Path(directory) / MANIFEST_NAME
    if not file.is_file():
        raise WeightIntegrityError(f"{directory} does not contain a complete weight version")
    return WeightManifest.from_json(file.read_text())


def read_tensors(directory: Path | str, manifest: WeightManifest) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the memory-mapped tensors in order, each checked against its digest.

    Raises:
        WeightIntegrityError: A file is truncated or a digest differs from the manifest.
    """
    mapped: dict[int, mmap.mmap] = {}
    for location in manifest.tensors:
        if location.bucket not in mapped:
            mapped = {location.bucket: _map(Path(directory) / f"{location.bucket:04d}.bin")}
        data = memoryview(mapped[location.bucket])[location.offset : location.offset + location.spec.nbytes]
        digest = blake3(data, max_threads=blake3.AUTO).hexdigest()
        if digest != location.spec.digest:
            raise WeightIntegrityError(
                f"{location.spec.name} of weight version {manifest.number} in {directory} "
                f"has digest {digest[:12]}; the manifest announces {location.spec.digest[:12]}"
            )
        flat = torch.frombuffer(data, dtype=torch_dtype(location.spec.dtype))
        yield location.spec.name, flat.reshape(location.spec.shape)


def _map(file: Path) -> mmap.mmap:
    with file.open("rb") as opened:
        # Private and writable, because torch warns about read-only buffers. The mapping is never written.
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
