"""IPC transport, as far as it works without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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
