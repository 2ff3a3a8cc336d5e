"""A real Ray of three nodes is looked over: what finds a place, which versions and volumes are wrong."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayNodes]:
    """A head without CPUs, a node with two GPUs that ranks are for, one that plays and decodes."""
    with start_ray_nodes(num_cpus=0, resources={"head": 1}) as nodes:
        nodes.add(num_cpus=4, num_gpus=2, resources={"learner": 1})
        nodes.add(num_cpus=4, num_gpus=1, resources={"rollout": 1, "clips": 1})
        yield nodes


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about to be given back."""
    monkeypatch.setattr(module, "RELEASE_TIMEOUT_S", 0.0)


def config(tmp_path: Path, *overrides: str) -> GrpoRunConfig:
    where = [f"runs={tmp_path / 'runs'}", "model=assets/tiny-base", "train.max_steps=1"]
    return load_config(GrpoRunConfig, "conf/tiny.yaml", [*where, *overrides])


def named(checks: list[CheckResult]) -> dict[str, CheckResult]:
    return {check.name: check for check in checks}


@pytest.mark.usefixtures("cluster")
async def test_a_run_that_fits_is_told_where(tmp_path: Path) -> None:
    found = named(await preflight(config(tmp_path, "learner.world_size=2", *GROUPS), gpus=True))
    assert {check.status for check in found.values()} == {CheckStatus.OK}, found
    assert found["nodes"].detail == "3 with 8 CPU and 3 GPU in all; no autoscaler brings more"
    assert found["learner ranks"].detail == "2, 1 CPU and 1 GPU each, in the group learner: room on one node"
    assert (
        found["rollout workers"].detail == "1, 1 CPU and 1 GPU each, in the group rollout: room on one node"
    )
    assert found["versions"].detail.startswith("the same on 3 nodes: vz_ray")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.usefixtures("cluster")
async def test_what_finds_no_place_is_said_with_the_reason(tmp_path: Path) -> None:
    asked = config(tmp_path, "learner.world_size=3", "rollout.engine.tensor_parallel_size=4", *GROUPS)
    found = named(await preflight(asked, gpus=True))
    ranks, workers = found["learner ranks"], found["rollout workers"]
    assert (ranks.status, workers.status) == (CheckStatus.FAILED, CheckStatus.FAILED)
    assert ranks.detail.endswith("2 of them find a place")
    assert ranks.fix.startswith("GPU is taken on the only node that could hold it")
    assert workers.fix == (
        "no node of the group rollout has 4 GPU, the largest node of the group rollout has 4 CPU and 1 GPU: "
        "lower rollout.engine.tensor_parallel_size, or add a larger node (an autoscaler would be asked if it were "
        "Ray's version 2)"
    )
    assert found["decoders"].status is CheckStatus.OK


@pytest.mark.usefixtures("cluster")
async def test_nodes_of_another_version_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(code_fingerprint(), "vllm", "0.1.0")
    versions = named(await preflight(config(tmp_path), gpus=False))["versions"]
    assert versions.status is CheckStatus.FAILED
    assert versions.detail.count("(here 0.1.0)") == 3
    assert "give every node the same image" in versions.fix


@pytest.mark.usefixtures("cluster")
async def test_volumes_and_keys_that_are_missing_are_named(tmp_path: Path) -> None:
    model = tmp_path / "nowhere"
    keys = (
        "reward.judge.model=gpt",
        "reward.judge.base_url=http://judge/v1",
        "reward.judge.api_key_env=VZ_RAY_NO_SUCH_KEY",
    )
    asked = config(tmp_path, f"model={model}", *keys, *GROUPS)
    found = named(await preflight(asked, gpus=False))
    volumes, secrets = found["volumes"], found["secrets"]
    assert (volumes.status, secrets.status) == (CheckStatus.FAILED, CheckStatus.FAILED)
    # By the node of ranks and that of workers; the head and decoders need none of it.
    assert volumes.detail.count(f"{model} is not there") == 2
    assert secrets.detail.endswith("lacks VZ_RAY_NO_SUCH_KEY")
    assert "from a Secret" in secrets.fix


@pytest.mark.usefixtures("cluster")
async def test_a_run_directory_that_cannot_be_written_or_ends_with_the_job_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    volumes = named(await preflight(config(tmp_path, f"runs={tmp_path}/file/runs"), gpus=False))["volumes"]
    assert volumes.detail == f"the driver: nothing can be written to {tmp_path}/file/runs: Not a directory"
    inside = tmp_path / "working_dir_files/_ray_pkg_1/runs"
    volumes = named(await preflight(config(tmp_path, f"runs={inside}"), gpus=False))["volumes"]
    assert "in the job's working directory, which ends with it" in volumes.detail


@pytest.mark.usefixtures("cluster")
async def test_too_little_room_for_checkpoints_or_weights_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "checkpoint_bytes", lambda model: 1 << 50)
    found = named(await preflight(config(tmp_path), gpus=False))
    assert "3 checkpoints of this model take about 18874368.0 GiB" in found["volumes"].detail
    assert "two sets of weights take 2097152.0 GiB of /dev/shm" in found["shared memory"].detail
    assert "emptyDir with medium Memory" in found["shared memory"].fix


def test_a_cluster_without_an_autoscaler_has_none(cluster: RayNodes) -> None:
    assert not get_autoscaler_state().enabled


@pytest.mark.usefixtures("cluster")
async def test_a_server_that_fits_is_told_where() -> None:
    asked = load_config(ServeConfig, "conf/serve/tiny.yaml", ["model=assets/tiny-base", "node_group=rollout"])
    found = named(await preflight(asked, gpus=True))
    assert {check.status for check in found.values()} == {CheckStatus.OK}, found
    assert found["agents"].detail == "1, 1 CPU and 1 GPU each, in the group rollout: room on one node"
    assert found["volumes"].detail == "model assets/tiny-base: there on every node that needs them"


def test_a_server_that_finds_no_place_ends_with_a_line_before_anything_is_started(
    cluster: RayNodes, tmp_path: Path
) -> None:
    where = [f"ray.address={cluster.address}", f"log_dir={tmp_path}/logs", "port=0", "model=assets/tiny-base"]
    done = run_vz_ray("serve", "conf/serve/tiny.yaml", *where, "node_group=serving", timeout_s=200)
    assert done.returncode == 2, done.stderr
    assert "agents" in done.stderr
    assert "no node of the cluster is of the group serving (none has a resource of that name)" in done.stderr
    assert "or leave group empty" in done.stderr
    assert "Traceback" not in done.stderr
    assert not cluster.actor_processes("ServeController")


def test_a_control_service_that_does_not_answer_is_named_with_what_it_was_asked(
    cluster: RayNodes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(autoscaler_state, "_RPC_S", 1)
    [service] = [p for p in cluster.processes() if "gcs_server" in command_line(p)]
    service.suspend()
    try:
        with caplog.at_level(logging.WARNING), pytest.raises(UserError) as ended:
            get_autoscaler_state()
    finally:
        service.resume()
    assert f"control service at {cluster.address} did not say how its autoscaler is, 3 times" in str(
        ended.value
    )
    asked = [r.message for r in caplog.records if "was asked for the autoscaler's state" in r.message]
    assert [message.partition(": ")[0].rpartition(", ")[2] for message in asked] == [
        "attempt 1 of 3",
        "attempt 2 of 3",
        "attempt 3 of 3",
    ]
    assert not get_autoscaler_state().enabled


def test_a_control_service_that_misses_one_deadline_is_asked_again(
    cluster: RayNodes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(autoscaler_state, "_RPC_S", 2)
    [service] = [p for p in cluster.processes() if "gcs_server" in command_line(p)]
    service.suspend()
    threading.Timer(3.0, service.resume).start()
    with caplog.at_level(logging.WARNING):
        assert not get_autoscaler_state().enabled
    assert "attempt 1 of 3" in caplog.text


def test_what_the_autoscaler_calls_infeasible_is_read_from_its_state() -> None:
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    state = reply.autoscaling_state
    state.autoscaler_state_version = 3
    state.infeasible_gang_resource_requests.add().requests.add().resources_bundle.update(
        {"GPU": 16.0, "CPU": 1.0}
    )
    state.infeasible_resource_requests.add().resources_bundle.update({"CPU": 400.0})
    state.pending_instance_requests.add().count = 2
    state.failed_instance_requests.add().reason = "no capacity"
    found = parse_cluster_status(reply)
    assert (found.enabled, found.pending_nodes, found.launch_failures) == (True, 2, ("no capacity",))
    large = ResourceDemand("ranks", {"CPU": 1.0, "GPU": 16.0}, 1, 1)
    assert infeasible_demands([large, ResourceDemand("others", {"CPU": 1.0}, 1, 1)], found) == [large]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (NodeQuery(readable=["/no/such/model"]), ["/no/such/model is not there"]),
        (NodeQuery(readable=["/"]), []),
    ],
)
def test_each_question_has_its_answer(asked: NodeQuery, said: list[str]) -> None:
    assert check_directories(asked) == said


def test_a_volume_that_is_not_the_drivers_is_told_by_the_file_in_it(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    mark.write_text("one")
    assert check_directories(NodeQuery(shared_file=(str(mark), "one"))) == []
    [said] = check_directories(NodeQuery(shared_file=(str(mark), "two")))
    assert said == f"{tmp_path} is not the driver's directory: it must be one shared volume"


def test_a_full_volume_is_named_and_nothing_is_left_on_it(tmp_path: Path) -> None:
    """The operating system refuses to make the trial file as large as it must be."""
    code = (
        "import resource, sys; from pathlib import Path; from vz_ray.jobs.node_survey import write_error;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); print(write_error(Path(sys.argv[1])))"
    )
    done: Any = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == f"nothing can be written to {tmp_path}: File too large"
    assert list(tmp_path.iterdir()) == []
    assert write_error(tmp_path / "new") == ""
    assert (tmp_path / "new").is_dir()
