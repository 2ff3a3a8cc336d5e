"""GPU checks of cluster nodes, from reports of their drivers."""

from __future__ import annotations

from pathlib import Path

import pytest

from vz_ray.config import load_config
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.jobs.gpu_checks import DriverReport, Gpu
from vz_ray.jobs.gpu_preflight import check_node_gpus
from vz_ray.jobs.node_survey import NodeReport
from vz_ray.jobs.resource_demands import ClusterConfig
from vz_ray.monitoring.checks import CheckResult, CheckStatus

MODEL = "model=Qwen2.5-VL-7B"


def grpo_config(*overrides: str) -> GrpoRunConfig:
    return load_config(GrpoRunConfig, Path("conf/videozoomer-7b-rl-split.yaml"), [MODEL, *overrides])


def make_gpu(total: float = 79.6, free: float = 79.0, *, mig: bool = False, processes: tuple = ()) -> Gpu:
    return Gpu(0, "NVIDIA H100", total, free, mig, processes)


def check(config: ClusterConfig, *gpus: Gpu, cuda: str = "13.0", torch_cuda: str = "13.0") -> list[CheckResult]:
    reports = [NodeReport("10.0.0.1", driver=DriverReport("580.1", cuda, gpus), torch_cuda=torch_cuda)]
    return check_node_gpus(config, [*reports, NodeReport("10.0.0.2")])


def test_free_gpus_are_one_line_with_the_plan() -> None:
    (result,) = check(grpo_config(), make_gpu(), make_gpu())
    assert result.status is CheckStatus.OK
    assert result.detail.startswith("2 of 79.6 GiB or more (NVIDIA H100); learner needs ")
    assert "engine needs" in result.detail


def test_nodes_without_gpus_are_not_checked() -> None:
    assert check_node_gpus(grpo_config(), [NodeReport("10.0.0.1")]) == []


def test_missing_driver_names_the_node() -> None:
    report = NodeReport("10.0.0.1", driver=DriverReport("", "", (), "nvidia-smi was not found"))
    (result,) = check_node_gpus(grpo_config(), [report])
    assert (result.name, result.status) == ("GPU driver of 10.0.0.1", CheckStatus.FAILED)
    assert "nvidia.com/gpu" in result.fix


def test_old_driver_names_the_needed_one() -> None:
    (result,) = check(grpo_config(), make_gpu(), cuda="12.8")
    assert result.status is CheckStatus.FAILED
    assert result.fix == "install driver 580 or newer"


@pytest.mark.parametrize(
    ("config", "component"),
    [
        (grpo_config(), "learner"),
        (
            grpo_config(
                "weights.transport=ipc", "learner.world_size=8", "rollout.num_workers=8", "learner.zero_stage=2"
            ),
            "learner and engine",
        ),
        (load_config(SftRunConfig, Path("conf/videozoomer-7b-sft.yaml"), [MODEL]), "learner"),
        (load_config(SftRunConfig, Path("conf/qwen3-vl-8b-sft.yaml"), ["model=Qwen3-VL-8B"]), "learner"),
        (
            load_config(GrpoRunConfig, Path("conf/qwen3.5-4b-rl.yaml"), ["model=Qwen3.5-4B"]),
            "learner, engine asleep",
        ),
    ],
)
def test_too_small_gpu_names_component_and_size(config: ClusterConfig, component: str) -> None:
    results = check(config, make_gpu(), make_gpu(total=23.9, free=23.5))
    result = next(result for result in results if result.name == f"memory of {component}")
    assert result.status is CheckStatus.FAILED
    assert result.detail.endswith("GiB on each GPU; the smallest has 23.9 GiB")
    assert "vz-ray plan --gpu-memory 24GiB" in result.fix


def test_other_process_and_mig_are_named() -> None:
    busy = make_gpu(free=40.0, mig=True, processes=((4711, "python", 39.5),))
    mig, memory = check(grpo_config(), busy)
    assert (mig.name, mig.status) == ("GPU 0 MIG of 10.0.0.1", CheckStatus.FAILED)
    assert (memory.name, memory.status) == ("GPU 0 memory of 10.0.0.1", CheckStatus.FAILED)
    assert "process 4711 (python) uses 39.5 GiB" in memory.detail


def test_mig_slices_are_allowed_if_no_gpus_communicate() -> None:
    one_rank = ("learner.world_size=1", "learner.offload=all", "weights.transport=shm")
    (mig,) = check(grpo_config(*one_rank), make_gpu(mig=True))
    assert (mig.name, mig.status) == ("GPU 0 MIG of 10.0.0.1", CheckStatus.WARNING)


def test_shared_gpu_is_planned_for_each_turn() -> None:
    colocated = ("train.colocate=true", "weights.transport=ipc", "learner.world_size=8", "rollout.num_workers=8")
    (result,) = check(grpo_config(*colocated), make_gpu())
    assert "learner, engine asleep needs" in result.detail
    assert "engine, learner asleep needs" in result.detail
    turns = ["learner, engine asleep", "handover of weights", "engine, learner asleep"]
    for total, lacking in ((40.0, turns[:1]), (20.0, turns)):
        small = check(grpo_config(*colocated), make_gpu(total=total))
        assert [result.name for result in small] == [f"memory of {turn}" for turn in lacking]


@pytest.mark.parametrize(("kv_cache", "status"), [("null", CheckStatus.FAILED), ("4", CheckStatus.WARNING)])
def test_server_needs_the_memory_of_its_engine(kv_cache: str, status: CheckStatus) -> None:
    overrides = ["model=assets/tiny-base", f"engine.kv_cache_gib={kv_cache}"]
    config = load_config(ServeConfig, Path("conf/serve/tiny.yaml"), overrides)
    (result,) = check(config, make_gpu(free=40.0))
    assert result.status is status


def test_unknown_model_is_a_warning() -> None:
    config = load_config(GrpoRunConfig, Path("conf/videozoomer-7b-rl.yaml"), ["model=nowhere"])
    (result,) = check(config, make_gpu())
    assert result.status is CheckStatus.WARNING
    assert "nowhere" in result.detail
