"""Pre-flight checks of the GPUs that nodes report."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vz_ray.config import load_config
from vz_ray.config.eval_run import EvalRunConfig
from vz_ray.config.run import GrpoRunConfig
from vz_ray.jobs.gpu_checks import Gpu
from vz_ray.jobs.gpu_preflight import check_gpus
from vz_ray.jobs.node_survey import NodeReport
from vz_ray.monitoring.checks import CheckStatus

GPU = Gpu(0, "NVIDIA H100", 79.6, 79.0, False, ())
SPLIT = ("train.colocate=false", "weights.transport=nccl", "learner.world_size=8", "rollout.num_workers=8")


def recipe(*overrides: str) -> GrpoRunConfig:
    settings = ["model=Qwen2.5-VL-7B", *SPLIT, *overrides]
    return load_config(GrpoRunConfig, "conf/videozoomer-7b-rl.yaml", settings)


def reports(*gpus: Gpu) -> list[NodeReport]:
    return [NodeReport("10.0.0.1"), NodeReport("10.0.0.2", gpus=gpus)]


def test_smallest_gpu_that_fits_is_named() -> None:
    [check] = check_gpus(recipe(), reports(GPU, replace(GPU, total_gib=140.0)))
    assert check.status is CheckStatus.OK
    assert check.detail.startswith("2, at least NVIDIA H100 with 80 GiB: learner 56 GiB, engine ")


def test_estimated_shortage_warns_with_a_fix() -> None:
    [check] = check_gpus(recipe(), reports(GPU, replace(GPU, name="NVIDIA A100", total_gib=40.0)))
    assert check.status is CheckStatus.WARNING
    assert check.detail.startswith("10.0.0.2 has NVIDIA A100 with 40 GiB; estimated are learner 56 GiB")
    assert check.fix.startswith("set learner.offload=")


def test_certain_shortage_fails() -> None:
    [check] = check_gpus(recipe("learner.world_size=1"), reports(GPU))
    assert check.status is CheckStatus.FAILED
    [check] = check_gpus(recipe(), reports(replace(GPU, total_gib=14.0)))
    assert (check.status, check.fix[:28]) == (CheckStatus.FAILED, "use GPUs with more memory, o")


@pytest.mark.parametrize(
    ("overrides", "status"),
    [
        ((), CheckStatus.FAILED),
        (("learner.world_size=1", "weights.transport=shm"), CheckStatus.WARNING),
        (
            ("learner.world_size=1", "weights.transport=shm", "rollout.engine.tensor_parallel_size=2"),
            CheckStatus.FAILED,
        ),
    ],
)
def test_mig_slices_fail_if_gpus_must_communicate(overrides: tuple[str, ...], status: CheckStatus) -> None:
    [check] = check_gpus(recipe(*overrides), reports(GPU, replace(GPU, index=1, mig=True)))
    assert check.status is status
    assert check.detail == "10.0.0.2: GPU 1 (NVIDIA H100) is split into MIG slices"
    assert "disable MIG" in check.fix


def test_nodes_without_gpus_and_other_runs_are_not_checked() -> None:
    assert check_gpus(recipe(), reports()) == []
    evaluation = load_config(EvalRunConfig, None, ["model=m", "benchmarks={mlvu: {annotations: x}}"])
    assert check_gpus(evaluation, reports(GPU)) == []


def test_model_that_cannot_be_planned_warns() -> None:
    [check] = check_gpus(recipe("model=unknown"), reports(GPU))
    assert (check.status, check.detail) == (CheckStatus.WARNING, "1 GPUs, memory not planned")
    assert "has no config.json" in check.fix
