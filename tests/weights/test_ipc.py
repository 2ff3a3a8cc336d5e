"""Weights on a shared GPU: what can be said without one."""

from __future__ import annotations

import pytest

from vz_ray.config.load import load
from vz_ray.config.run import RunConfig
from vz_ray.observe.errors import UserError
from vz_ray.weights.ipc import check_gpu
from vz_ray.weights.ipc_engine import IpcUpdateInfo, IpcWeightTransferEngine
from vz_ray.weights.plugin import ShmUpdateInfo
from vz_ray.weights.store import WeightsBroken


def test_another_gpu_is_named() -> None:
    check_gpu("GPU-1", "GPU-1")
    with pytest.raises(
        WeightsBroken, match=r"on GPU GPU-1 and this engine computes on GPU GPU-2; .* use nccl"
    ):
        check_gpu("GPU-1", "GPU-2")


def test_the_engine_tells_a_copy_from_a_loan() -> None:
    engine = IpcWeightTransferEngine.__new__(IpcWeightTransferEngine)
    copy = engine.parse_update_info({"directory": "/there", "checksum": "c"})
    assert copy == ShmUpdateInfo("/there", "c")
    parts = {"gpu": "GPU-1", "names": ["a"], "dtype_names": ["bfloat16"], "shapes": [[2]], "loans": [[0]]}
    assert engine.parse_update_info(parts) == IpcUpdateInfo(**parts)


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("learner.ranks=2", "1"),
        ("learner.zero_stage=3", "0 or 1 or 2"),
        ("rollout.engine.tensor_parallel=2", "1"),
        ("rollout.max_workers=3", "1"),
    ],
)
def test_more_than_one_gpu_can_hold_is_refused(setting: str, wanted: str) -> None:
    with pytest.raises(UserError, match=f"must be {wanted}: or use nccl"):
        load(RunConfig, "conf/tiny.yaml", ["weights.transport=ipc", setting])
