"""Pre-flight checks on a real Ray cluster of three nodes: placement, versions, volumes, secrets."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.jobs.nvidia_smi import GPU_XML, smi_xml, write_smi
from tests.ray_nodes import RayNodes, start_ray_nodes
from tests.small_run import command_line, run_vz_ray
from vz_ray.config import load_config
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.jobs import autoscaler_state
from vz_ray.jobs import preflight as module
from vz_ray.jobs.autoscaler_state import get_autoscaler_state, infeasible_demands, parse_cluster_status
from vz_ray.jobs.node_survey import NodeQuery, check_directories, write_error
from vz_ray.jobs.preflight import preflight
from vz_ray.jobs.resource_demands import ResourceDemand
from vz_ray.monitoring.checks import CheckResult, CheckStatus
from vz_ray.utils.code_fingerprint import code_fingerprint
from vz_ray.utils.errors import UserError

GROUPS = ("learner.node_group=learner", "rollout.node_group=rollout", "clips.node_group=clips")


FREE_GPU = GPU_XML.format(index=0, mig="Disabled", used=0, free=81000, processes="")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """A head node without CPUs, a learner node with two GPUs, a node for rollout and decoders.

    The driver of the GPUs is a script that every node finds first.
    """
    smi = write_smi(tmp_path_factory.mktemp("smi"), smi_xml(FREE_GPU))
    with pytest.MonkeyPatch.context() as patch, start_nodes(patch, smi.parent) as nodes:
        yield nodes


@contextmanager
def start_nodes(patch: pytest.MonkeyPatch, first_in_path: Path) -> Iterator[RayNodes]:
    patch.setenv("PATH", f"{first_in_path}:{os.environ['PATH']}")
    with start_ray_nodes(num_cpus=0, resources={"head": 1}) as nodes:
        nodes.add(num_cpus=4, num_gpus=2, resources={"learner": 1})
        nodes.add(num_cpus=4, num_gpus=1, resources={"rollout": 1, "clips": 1})
        yield nodes


@pytest.fixture(autouse=True)
def no_release_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run is about to release resources here."""
    monkeypatch.setattr(module, "RELEASE_TIMEOUT_S", 0.0)


def config(tmp_path: Path, *overrides: str) -> GrpoRunConfig:
    base = [
        f"runs={tmp_path / 'runs'}",
        "model=assets/tiny-base",
        "train.max_steps=1",
        "learner.cpus_per_rank=1",
    ]
    return load_config(GrpoRunConfig, "conf/laptop.yaml", [*base, *overrides])


def by_name(checks: list[CheckResult]) -> dict[str, CheckResult]:
    return {check.name: check for check in checks}


@pytest.mark.usefixtures("cluster")
async def test_fitting_run_passes_all_checks(tmp_path: Path) -> None:
    checks = by_name(await preflight(config(tmp_path, "learner.world_size=2", *GROUPS), gpus=True))
    assert {check.status for check in checks.values()} == {CheckStatus.OK}, checks
    assert checks["nodes"].detail == "3 with 8 CPU and 3 GPU in total; no autoscaler"
    assert checks["learner ranks"].detail == "2, 1 CPU and 1 GPU each, node group learner: fits on one node"
    assert checks["rollout workers"].detail == "1, 1 CPU and 1 GPU each, node group rollout: fits on one node"
    assert checks["versions"].detail.startswith("the same on 3 nodes: vz_ray")
    assert list((tmp_path / "runs").iterdir()) == []
    # Both GPU nodes run the same script.
    assert checks["GPUs"].detail.startswith("2 of 79.6 GiB or more (NVIDIA H100 80GB HBM3); learner needs ")


@pytest.mark.usefixtures("cluster")
async def test_lost_gpu_of_a_node_fails(tmp_path: Path) -> None:
    output = Path(shutil.which("nvidia-smi") or "").parent / "output"
    healthy = output.read_text()
    output.write_text("not XML: GPU is lost")
    try:
        checks = await preflight(config(tmp_path), gpus=True)
    finally:
        output.write_text(healthy)
    failed = [check for check in checks if check.name.startswith("GPU driver of ")]
    assert [check.status for check in failed] == [CheckStatus.FAILED] * 2
    assert failed[0].detail.startswith("unreadable output of nvidia-smi")


@pytest.mark.usefixtures("cluster")
async def test_unplaceable_actors_fail_with_reason(tmp_path: Path) -> None:
    run_config = config(tmp_path, "learner.world_size=3", "rollout.engine.tensor_parallel_size=4", *GROUPS)
    checks = by_name(await preflight(run_config, gpus=True))
    ranks, workers = checks["learner ranks"], checks["rollout workers"]
    assert (ranks.status, workers.status) == (CheckStatus.FAILED, CheckStatus.FAILED)
    assert ranks.detail.endswith("only 2 fit")
    assert ranks.fix.startswith("GPU is in use on the only node that could take it")
    assert workers.fix == (
        "no node of the group rollout has 4 GPU, the largest node of the group rollout has 4 CPU and 1 GPU: "
        "lower rollout.engine.tensor_parallel_size, or add a larger node (only an autoscaler of Ray's "
        "version 2 is queried)"
    )
    assert checks["decoders"].status is CheckStatus.OK


@pytest.mark.usefixtures("cluster")
async def test_version_mismatch_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(code_fingerprint(), "vllm", "0.1.0")
    versions = by_name(await preflight(config(tmp_path), gpus=False))["versions"]
    assert versions.status is CheckStatus.FAILED
    assert versions.detail.count("(driver 0.1.0)") == 3
    assert "use the same image on every node" in versions.fix


@pytest.mark.usefixtures("cluster")
async def test_missing_model_and_key_fail(tmp_path: Path) -> None:
    model = tmp_path / "nowhere"
    keys = (
        "reward.judge.model=gpt",
        "reward.judge.base_url=http://judge/v1",
        "reward.judge.api_key_env=VZ_RAY_NO_SUCH_KEY",
    )
    run_config = config(tmp_path, f"model={model}", *keys, *GROUPS)
    checks = by_name(await preflight(run_config, gpus=False))
    volumes, secrets = checks["volumes"], checks["secrets"]
    assert (volumes.status, secrets.status) == (CheckStatus.FAILED, CheckStatus.FAILED)
    # The learner node and the rollout node need the model; the head node does not.
    assert volumes.detail.count(f"{model} does not exist") == 2
    assert secrets.detail.endswith("lacks VZ_RAY_NO_SUCH_KEY")
    assert "from a Secret" in secrets.fix


@pytest.mark.usefixtures("cluster")
async def test_unwritable_or_temporary_run_directory_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    volumes = by_name(await preflight(config(tmp_path, f"runs={tmp_path}/file/runs"), gpus=False))["volumes"]
    assert volumes.detail == f"driver: cannot write to {tmp_path}/file/runs: Not a directory"
    job_dir = tmp_path / "working_dir_files/_ray_pkg_1/runs"
    volumes = by_name(await preflight(config(tmp_path, f"runs={job_dir}"), gpus=False))["volumes"]
    assert "in the job's working directory, which is deleted with the job" in volumes.detail


@pytest.mark.usefixtures("cluster")
async def test_insufficient_disk_and_shared_memory_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "checkpoint_bytes", lambda model: 1 << 50)
    checks = by_name(await preflight(config(tmp_path), gpus=False))
    assert "3 checkpoints of this model need about 18874368.0 GiB" in checks["volumes"].detail
    assert "two sets of weights need 2097152.0 GiB of /dev/shm" in checks["shared memory"].detail
    assert "emptyDir with medium Memory" in checks["shared memory"].fix


def test_cluster_without_autoscaler_reports_disabled(cluster: RayNodes) -> None:
    assert not get_autoscaler_state().enabled


@pytest.mark.usefixtures("cluster")
async def test_fitting_server_passes_all_checks() -> None:
    run_config = load_config(ServeConfig, "conf/serve/tiny.yaml", ["model=assets/tiny-base", "node_group=rollout"])
    checks = by_name(await preflight(run_config, gpus=True))
    assert {check.status for check in checks.values()} == {CheckStatus.OK}, checks
    assert checks["agents"].detail == "1, 1 CPU and 1 GPU each, node group rollout: fits on one node"
    assert checks["volumes"].detail == "model assets/tiny-base: on every node that needs them"


def test_unplaceable_server_fails_before_start(cluster: RayNodes, tmp_path: Path) -> None:
    arguments = [
        f"ray.address={cluster.address}",
        f"log_dir={tmp_path}/logs",
        "port=0",
        "model=assets/tiny-base",
    ]
    result = run_vz_ray("serve", "conf/serve/tiny.yaml", *arguments, "node_group=serving", timeout_s=200)
    assert result.returncode == 2, result.stderr
    assert "agents" in result.stderr
    assert (
        "no node of the cluster is in the node group serving (no node has a resource with that name)" in result.stderr
    )
    assert "or leave node_group empty" in result.stderr
    assert "Traceback" not in result.stderr
    assert not cluster.actor_processes("ServeController")


@pytest.fixture
def suspended_control_service(cluster: RayNodes) -> Iterator[psutil.Process]:
    """Suspend the cluster's control service; resume it at the end of the test."""
    [service] = [process for process in cluster.processes() if "gcs_server" in command_line(process)]
    service.suspend()
    yield service
    service.resume()


def test_unresponsive_control_service_fails_after_retries(
    cluster: RayNodes,
    suspended_control_service: psutil.Process,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(autoscaler_state, "_RPC_TIMEOUT_S", 1)
    with caplog.at_level(logging.WARNING), pytest.raises(UserError) as error:
        get_autoscaler_state()
    suspended_control_service.resume()
    assert f"control service at {cluster.address} did not return the autoscaler state in 3 attempts" in str(error.value)
    warnings = [r.message for r in caplog.records if "No autoscaler state" in r.message]
    assert [message.partition(": ")[0].rpartition(", ")[2] for message in warnings] == [
        "attempt 1 of 3",
        "attempt 2 of 3",
        "attempt 3 of 3",
    ]
    assert not get_autoscaler_state().enabled


def test_control_service_query_is_retried(
    suspended_control_service: psutil.Process, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(autoscaler_state, "_RPC_TIMEOUT_S", 2)
    threading.Timer(3.0, suspended_control_service.resume).start()
    with caplog.at_level(logging.WARNING):
        assert not get_autoscaler_state().enabled
    assert "attempt 1 of 3" in caplog.text


def test_infeasible_requests_are_parsed() -> None:
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    state = reply.autoscaling_state
    state.autoscaler_state_version = 3
    state.infeasible_gang_resource_requests.add().requests.add().resources_bundle.update({"GPU": 16.0, "CPU": 1.0})
    state.infeasible_resource_requests.add().resources_bundle.update({"CPU": 400.0})
    state.pending_instance_requests.add().count = 2
    state.failed_instance_requests.add().reason = "no capacity"
    parsed = parse_cluster_status(reply)
    assert (parsed.enabled, parsed.pending_nodes, parsed.launch_failures) == (True, 2, ("no capacity",))
    large = ResourceDemand("ranks", {"CPU": 1.0, "GPU": 16.0}, 1, 1)
    assert infeasible_demands([large, ResourceDemand("others", {"CPU": 1.0}, 1, 1)], parsed) == [large]


@pytest.mark.parametrize(
    ("query", "problems"),
    [
        (NodeQuery(readable=["/no/such/model"]), ["/no/such/model does not exist"]),
        (NodeQuery(readable=["/"]), []),
    ],
)
def test_missing_directories_are_reported(query: NodeQuery, problems: list[str]) -> None:
    assert check_directories(query) == problems


def test_marker_file_detects_other_volume(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    marker.write_text("one")
    assert check_directories(NodeQuery(shared_file=(str(marker), "one"))) == []
    [problem] = check_directories(NodeQuery(shared_file=(str(marker), "two")))
    assert problem == f"{tmp_path} is not the driver's directory; it must be one shared volume"


def test_full_volume_is_reported_and_left_empty(tmp_path: Path) -> None:
    """A file size limit of the operating system simulates a full volume."""
    code = (
        "import resource, sys; from pathlib import Path; from vz_ray.jobs.node_survey import write_error;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); print(write_error(Path(sys.argv[1])))"
    )
    result: Any = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.strip() == f"cannot write to {tmp_path}: File too large"
    assert list(tmp_path.iterdir()) == []
    assert write_error(tmp_path / "new") == ""
    assert (tmp_path / "new").is_dir()
