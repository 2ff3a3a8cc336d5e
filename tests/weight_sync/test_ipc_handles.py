"""IPC transport, as far as it works without a GPU."""

from __future__ import annotations

import pytest

from vz_ray.config.load import load_config
from vz_ray.config.run import GrpoRunConfig
from vz_ray.utils.errors import UserError
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


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("learner.world_size=2", "1"),
        ("learner.zero_stage=3", "0 or 1 or 2"),
        ("rollout.engine.tensor_parallel_size=2", "1"),
        ("rollout.max_workers=3", "1"),
    ],
)
def test_ipc_rejects_multiple_gpus(setting: str, expected: str) -> None:
    with pytest.raises(UserError, match=rf"must be {expected}\. Use weights\.transport=nccl"):
        load_config(GrpoRunConfig, "conf/laptop.yaml", ["weights.transport=ipc", setting])
