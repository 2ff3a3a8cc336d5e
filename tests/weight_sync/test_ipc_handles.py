"""IPC transport, as far as it works without a GPU."""

from __future__ import annotations

import pytest

from vz_ray.weight_sync.ipc_handles import check_same_gpu
from vz_ray.weight_sync.vllm_ipc import IpcUpdateInfo, IpcWeightTransferEngine
from vz_ray.weight_sync.vllm_plugin import ShmUpdateInfo
from vz_ray.weight_sync.weight_store import WeightIntegrityError


def test_different_gpus_are_rejected() -> None:
    check_same_gpu("GPU-1", "GPU-1")
    with pytest.raises(WeightIntegrityError, match=r"on GPU GPU-1 and this engine runs on GPU GPU-2; .* Use nccl"):
        check_same_gpu("GPU-1", "GPU-2")


def test_engine_distinguishes_copies_and_handles() -> None:
    engine = IpcWeightTransferEngine.__new__(IpcWeightTransferEngine)
    copy = engine.parse_update_info({"directory": "/there", "checksum": "c"})
    assert copy == ShmUpdateInfo("/there", "c")
    parts = {"gpu": "GPU-1", "names": ["a"], "dtype_names": ["bfloat16"], "shapes": [[2]], "handles": [[0]]}
    assert engine.parse_update_info(parts) == IpcUpdateInfo(**parts)
