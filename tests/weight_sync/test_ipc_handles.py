"""IPC transport, as far as it works without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vz_ray.weight_sync import ipc_handles
from vz_ray.weight_sync.ipc_handles import IpcExporter, check_same_gpu, open_part
from vz_ray.weight_sync.vllm_ipc import IpcUpdateInfo, IpcWeightTransferEngine
from vz_ray.weight_sync.vllm_plugin import ShmUpdateInfo
from vz_ray.weight_sync.weight_source import ModuleSource
from vz_ray.weight_sync.weight_store import WeightIntegrityError


def test_different_gpus_are_rejected() -> None:
    check_same_gpu("GPU-1", "GPU-1")
    with pytest.raises(WeightIntegrityError, match=r"on GPU GPU-1 and this engine runs on GPU GPU-2; .* Use nccl"):
        check_same_gpu("GPU-1", "GPU-2")


def test_engine_distinguishes_copies_and_handles() -> None:
    engine = IpcWeightTransferEngine.__new__(IpcWeightTransferEngine)
    copy = engine.parse_update_info({"directory": "/there", "checksum": "c"})
    assert copy == ShmUpdateInfo("/there", "c")
    parts: dict[str, Any] = {"gpu": "GPU-1", "storages": [[4]], "locations": [[0, 0]]}
    parts |= {"names": ["a"], "dtype_names": ["bfloat16"], "shapes": [[2]]}
    assert engine.parse_update_info(parts) == IpcUpdateInfo(**parts)


def test_each_part_is_read_on_cpu() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2).bfloat16())
    exporter = IpcExporter()
    exporter.start(ModuleSource(module), bucket_bytes=160)
    tensors: dict[str, torch.Tensor] = {}
    num_parts = 0
    while (part := exporter.next_part()) is not None:
        tensors |= {name: tensor.clone() for name, tensor in open_part(part, torch.device("cpu"))}
        num_parts += 1
    assert num_parts == 2
    assert tensors.keys() == dict(module.named_parameters()).keys()
    for name, parameter in module.named_parameters():
        assert torch.equal(tensors[name], parameter), name


def test_stopped_export_frees_its_memory() -> None:
    exporter = IpcExporter()
    exporter.start(ModuleSource(torch.nn.Linear(8, 4)), bucket_bytes=1)
    part = exporter.next_part()
    assert part is not None
    exporter.stop()
    exporter.stop()
    assert exporter.next_part() is None
    with pytest.raises(FileNotFoundError):
        list(open_part(part, torch.device("cpu")))


def test_counters_of_a_failed_receiver_are_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part has two tensors. torch keeps the memory of those whose count is not 0."""
    monkeypatch.setattr(ipc_handles, "_SHARED_MEMORY", tmp_path)
    counters = np.memmap(tmp_path / "torch_1", np.uint64, "w+", shape=8)
    exported: list[int] = []

    class CountingExporter(IpcExporter):
        """On CPU: records the counters of a bucket as on a GPU."""

        def _export_host(self) -> tuple[list[list[Any]], list[list[int]]]:
            for _ in self._exported:
                counters[len(exported)] = 1
                self._counters.append((b"/torch_1", len(exported)))
                exported.append(len(exported))
            return super()._export_host()

    exporter = CountingExporter()
    exporter.start(ModuleSource(torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))), bucket_bytes=80)
    exporter.next_part()
    counters[:2] = (0, 0)  # received
    exporter.next_part()
    counters[2:4] = (0, 1)  # the receiver died while it held the second tensor
    assert exporter.next_part(has_receiver=False) == {}
    assert counters.tolist() == [0] * 8
    assert exporter.next_part(has_receiver=False) is None
    assert exported == [0, 1, 2, 3]
    exporter.start(ModuleSource(torch.nn.Linear(4, 4)), bucket_bytes=80)
    exporter.next_part()
    exporter.stop()  # without a receiver's answer
    assert counters.tolist() == [0] * 8


def test_counters_of_a_removed_file_are_ignored() -> None:
    ipc_handles.clear_counter(b"/torch_vz_ray_missing", 0)
