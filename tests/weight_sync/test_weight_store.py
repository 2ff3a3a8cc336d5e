"""Weight store: completeness and integrity of stored versions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vz_ray.weight_sync.weight_source import ModuleSource, split_into_buckets
from vz_ray.weight_sync.weight_store import WeightIntegrityError, WeightStore, read_manifest, read_tensors
from vz_ray.weight_sync.weight_version import TensorSpec, WeightManifest, weights_checksum


def model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 300), torch.nn.Embedding(3, 1))
    net[0].half()
    net[2].bfloat16()
    return net


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    return WeightStore(tmp_path / "weights", bucket_bytes=2048)


def test_version_round_trip(store: WeightStore) -> None:
    net = model()
    manifest = store.write_version(3, ModuleSource(net))
    read = dict(read_tensors(store.path(3), read_manifest(store.path(3))))
    assert list(read) == [name for name, _ in net.named_parameters()]
    for name, parameter in net.named_parameters():
        assert read[name].dtype == parameter.dtype
        assert torch.equal(read[name], parameter)
    assert len(manifest.bucket_bytes) > 1
    assert manifest.nbytes == sum(p.numel() * p.itemsize for p in net.parameters())


def test_checksum_depends_only_on_tensors(store: WeightStore) -> None:
    first = store.write_version(1, ModuleSource(model(0)))
    same = store.write_version(2, ModuleSource(model(0)))
    other = store.write_version(3, ModuleSource(model(1)))
    assert first.checksum == same.checksum != other.checksum
    specs = [location.spec for location in first.tensors]
    assert weights_checksum(specs) == weights_checksum(specs[::-1])


def test_manifest_round_trip(store: WeightStore) -> None:
    manifest = store.write_version(1, ModuleSource(model()))
    assert WeightManifest.from_json(manifest.to_json()) == manifest == read_manifest(store.path(1))


def test_old_versions_are_deleted(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    for number in (1, 2, 5):
        store.write_version(number, ModuleSource(model()))
    assert store.versions() == [5]


def test_version_number_must_increase(store: WeightStore) -> None:
    store.write_version(4, ModuleSource(model()))
    with pytest.raises(ValueError, match="4 is not newer than 4"):
        store.write_version(4, ModuleSource(model()))


def test_corrupt_tensor_is_named(store: WeightStore) -> None:
    manifest = store.write_version(1, ModuleSource(model()))
    location = manifest.tensors[2]
    file = store.path(1) / f"{location.bucket:04d}.bin"
    data = bytearray(file.read_bytes())
    data[location.offset + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightIntegrityError, match=rf"{location.spec.name} of weight version 1"):
        list(read_tensors(store.path(1), manifest))


def test_failing_source_leaves_no_version(store: WeightStore) -> None:
    class FailingSource(ModuleSource):
        def buckets(self, max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
            yield from list(super().buckets(max_bytes))[:1]
            raise RuntimeError("rank 1 is gone")

    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        store.write_version(1, FailingSource(model()))
    assert store.versions() == []
    assert list(store.root.iterdir()) == []
    with pytest.raises(WeightIntegrityError, match="does not contain a complete weight version"):
        read_manifest(store.path(1))
    store.write_version(1, ModuleSource(model()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("0.bias"), "did not deliver 0.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "did not announce extra"),
        (lambda t: t.update({"0.bias": torch.zeros(6)}), r"0.bias was delivered as float32\[6\]"),
    ],
)
def test_source_must_match_its_specs(store: WeightStore, change, message: str) -> None:  # type: ignore[no-untyped-def]
    class ModifiedSource(ModuleSource):
        def buckets(self, max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
            tensors = {name: t for bucket in super().buckets(max_bytes) for name, t in bucket.items()}
            change(tensors)
            yield tensors

    with pytest.raises(WeightIntegrityError, match=message):
        store.write_version(1, ModifiedSource(model()))
    assert store.versions() == []


def test_tensor_in_two_buckets_is_rejected(store: WeightStore) -> None:
    class DuplicatingSource(ModuleSource):
        def buckets(self, max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
            yield from super().buckets(max_bytes)
            yield from super().buckets(max_bytes)

    with pytest.raises(ValueError, match="twice"):
        store.write_version(1, DuplicatingSource(model()))
    assert store.versions() == []


def test_installed_version_equals_the_original(store: WeightStore, tmp_path: Path) -> None:
    manifest = store.write_version(2, ModuleSource(model()))
    other_store = WeightStore(tmp_path / "other_store")
    abandoned = other_store.root / ".draft-00000001-999999999"  # no process has this id
    abandoned.mkdir()
    for _ in range(2):  # a second worker of the node stages the same version
        for index, file in enumerate(sorted(store.path(2).glob("*.bin"))):
            assert not abandoned.exists() or index == 0
            other_store.stage_bucket(manifest, index, file.read_bytes())
        path = other_store.commit_staged(manifest)
    assert [entry.name for entry in other_store.root.iterdir()] == [path.name] == [other_store.path(2).name]
    original = dict(read_tensors(store.path(2), manifest))
    for name, tensor in read_tensors(path, read_manifest(path)):
        assert torch.equal(tensor, original[name])


def test_truncated_bucket_is_rejected(store: WeightStore, tmp_path: Path) -> None:
    manifest = store.write_version(2, ModuleSource(model()))
    other_store = WeightStore(tmp_path / "other_store")
    with pytest.raises(WeightIntegrityError, match="bucket 0 of weight version 2 has 3 bytes"):
        other_store.stage_bucket(manifest, 0, b"abc")
    assert other_store.versions() == []


def test_insufficient_shared_memory_fails_early(store: WeightStore) -> None:
    class HugeSource(ModuleSource):
        def specs(self) -> list[TensorSpec]:
            return [TensorSpec("w", "float32", (1 << 40,))]

    with pytest.raises(OSError, match=r"needs 4398\.0 GB\. Enlarge shared memory"):
        store.write_version(1, HugeSource(model()))
    assert list(store.root.iterdir()) == []


def test_buckets_contain_every_tensor_within_limit() -> None:
    specs = [TensorSpec(str(i), "float32", (size,)) for i, size in enumerate([10, 10, 500, 1, 1, 200, 60])]
    buckets = split_into_buckets(specs, 1000)
    assert [spec for bucket in buckets for spec in bucket] == specs
    assert all(len(bucket) == 1 or sum(s.nbytes for s in bucket) <= 1000 for bucket in buckets)
    assert [[s.name for s in bucket] for bucket in buckets] == [["0", "1"], ["2"], ["3", "4", "5"], ["6"]]
