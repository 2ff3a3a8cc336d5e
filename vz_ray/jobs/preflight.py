"""Pre-flight checks: report in seconds whether a run can start on the connected cluster.

nodes          nodes of the cluster, and whether an autoscaler adds more
placement      whether each actor fits: now, on new nodes, or never
versions       every node runs the driver's versions of the code, Ray and vLLM
volumes        the model exists; the run directory is one shared, writable volume
secrets        environment variables with keys are set
shared memory  two sets of weights fit into /dev/shm of the nodes
GPUs           driver, memory for engine and learner, other processes, MIG
"""

from __future__ import annotations

import asyncio
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray

from vz_ray.config.run import GrpoRunConfig, RolloutRunConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.jobs.autoscaler_state import (
    AutoscalerState,
    get_autoscaler_state,
    infeasible_demands,
    request_resources,
)
from vz_ray.jobs.cluster_fit import PlacementResult, place_demands
from vz_ray.jobs.gpu_preflight import check_node_gpus
from vz_ray.jobs.node_survey import NodeQuery, NodeReport, survey_nodes, write_error
from vz_ray.jobs.resource_demands import (
    LEARNER_RANKS,
    ROLLOUT_WORKERS,
    TEACHER_WORKERS,
    ClusterConfig,
    ResourceDemand,
    checkpoint_bytes,
    resource_demands,
)
from vz_ray.monitoring.checks import CheckResult, CheckStatus
from vz_ray.utils.code_fingerprint import code_fingerprint
from vz_ray.utils.errors import join_first

GIB = 1 << 30
_CHECKPOINT_PARTS = 6
"""Checkpoint bytes per byte of bfloat16 weights: float32 weights and two optimizer moments."""
RAY_WORKING_DIR_NAME = "working_dir_files"
"""Directory in which Ray unpacks the working directories of jobs."""
RELEASE_TIMEOUT_S = 20.0
"""Maximum wait for a run that just ended to release its resources."""
_MAX_LISTED = 4
"""Maximum number of nodes in one message."""


async def preflight(config: ClusterConfig, *, gpus: bool) -> list[CheckResult]:
    """Run all checks. Ray must be initialized.

    Args:
        config: Config of the run.
        gpus: Engines and learner ranks use GPUs.

    Raises:
        UserError: The cluster's control service does not respond.
    """
    demands = [demand for demand in resource_demands(config, gpus=gpus) if demand.max_count]
    state = await asyncio.to_thread(get_autoscaler_state)
    nodes = alive_nodes()
    checks = [_check_nodes(nodes, state), *await check_placement(demands, nodes, state)]
    with _volume_marker(runs_directory(config)) as shared_file:
        node_groups = sorted({demand.node_group for demand in demands if demand.node_group})
        queries = node_queries(config, demands, shared_file)
        reports = await survey_nodes(nodes, queries, node_groups)
    checks += [_check_versions(reports), _check_volumes(config, reports)]
    checks += [*_check_secrets(config, reports), *_check_shared_memory(config, reports)]
    return [*checks, *await asyncio.to_thread(check_node_gpus, config, reports)]


def alive_nodes() -> list[Mapping[str, Any]]:
    """Return the entries of `ray.nodes()` for nodes that are alive and not draining."""
    from ray._private.state import state  # no public API

    draining = state.get_draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]


def _check_nodes(nodes: Sequence[Mapping[str, Any]], state: AutoscalerState) -> CheckResult:
    gpus = sum(node["Resources"].get("GPU", 0) for node in nodes)
    cpus = sum(node["Resources"].get("CPU", 0) for node in nodes)
    autoscaler = "autoscaler enabled" if state.enabled else "no autoscaler"
    detail = f"{len(nodes)} with {cpus:g} CPU and {gpus:g} GPU in total; {autoscaler}"
    if state.launch_failures:
        return CheckResult("nodes", CheckStatus.WARNING, detail, f"a node failed to start: {state.launch_failures[-1]}")
    return CheckResult("nodes", CheckStatus.OK, detail)


async def check_placement(
    demands: Sequence[ResourceDemand], nodes: Sequence[Mapping[str, Any]], state: AutoscalerState
) -> list[CheckResult]:
    """Check each demand. If one does not fit, request its resources from an enabled autoscaler."""
    from ray._private.state import available_resources_per_node  # the public API returns only the sum

    end_time = time.monotonic() + RELEASE_TIMEOUT_S
    while True:
        free = available_resources_per_node()
        results = place_demands(
            demands,
            [node["Resources"] for node in nodes],
            [free.get(node["NodeID"], {}) for node in nodes],
        )
        occupied = [result for result in results if not result.complete and result.feasible]
        if not occupied or state.enabled or time.monotonic() > end_time:
            break
        await asyncio.sleep(1.0)
    unplaced = [result.demand for result in results if not result.complete]
    if unplaced and state.enabled:
        state = await request_resources(unplaced)
    infeasible = infeasible_demands(unplaced, state)
    return [_placement_check(result, state, infeasible=result.demand in infeasible) for result in results]


def _placement_check(result: PlacementResult, state: AutoscalerState, *, infeasible: bool) -> CheckResult:
    demand = result.demand
    if result.complete:
        maximum = f" (up to {demand.max_count})" if demand.max_count > demand.min_count else ""
        nodes = {0: "", 1: " on one node"}.get(result.node_count, f" on {result.node_count} nodes")
        return CheckResult(demand.name, CheckStatus.OK, f"{demand}{maximum}: fits{nodes}")
    detail = f"{demand}: only {result.placed} fit"
    if infeasible:
        fix = f"no node type of the autoscaler can hold one; on the current nodes, {result.reason}"
        return CheckResult(demand.name, CheckStatus.FAILED, detail, fix)
    if state.enabled:
        pending = f"{state.pending_nodes} nodes are starting" if state.pending_nodes else "the autoscaler is searching"
        failures = f"; a node failed to start: {state.launch_failures[-1]}" if state.launch_failures else ""
        return CheckResult(demand.name, CheckStatus.WARNING, f"{detail}; {pending}{failures}")
    fix = f"{result.reason} (only an autoscaler of Ray's version 2 is queried)"
    return CheckResult(demand.name, CheckStatus.FAILED, detail, fix)


@contextmanager
def _volume_marker(folder: Path | None) -> Iterator[tuple[str, str] | None]:
    """Write a file into the run directory's volume; nodes that see its content share the volume."""
    if folder is None or write_error(folder):
        yield None
        return
    content = uuid.uuid4().hex
    path = folder / f".vz_ray-volume-{content[:8]}"
    path.write_text(content)
    try:
        yield str(path), content
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def runs_directory(config: ClusterConfig) -> Path | None:
    """Return the parent of the run directories; None for a server."""
    return None if isinstance(config, ServeConfig) else Path(config.runs).absolute()


def node_queries(
    config: ClusterConfig, demands: Sequence[ResourceDemand], shared_file: tuple[str, str] | None
) -> dict[str, NodeQuery]:
    """Return the query of each node group.

    Engines and ranks need the model, ranks the run directory, rollout workers the keys. GPUs are queried where
    engines or ranks use them.
    """
    model = [config.model] if config.model else []
    queries: dict[str, NodeQuery] = {}
    for demand in demands:
        is_learner, is_rollout = LEARNER_RANKS in demand.name, ROLLOUT_WORKERS in demand.name
        readable = model if is_learner or is_rollout or demand.name == "agents" else []
        if demand.name == TEACHER_WORKERS and isinstance(config, GrpoRunConfig):
            readable = [config.teacher.model]
        query = queries.get(demand.node_group, NodeQuery())
        queries[demand.node_group] = NodeQuery(
            readable=sorted({*query.readable, *readable}),
            writable=[str(Path(shared_file[0]).parent)] if is_learner and shared_file else query.writable,
            shared_file=shared_file if is_learner else query.shared_file,
            env_vars=_key_env_vars(config) if is_rollout else query.env_vars,
            gpus=query.gpus or bool(demand.resources.get("GPU")),
        )
    return queries


def _key_env_vars(config: ClusterConfig) -> list[str]:
    """Return the environment variables with keys that rollout workers need."""
    if not isinstance(config, RolloutRunConfig):
        return []
    judge = config.reward.judge
    return [judge.api_key_env] if judge.model and judge.api_key_env else []


def _check_versions(reports: Sequence[NodeReport]) -> CheckResult:
    driver = code_fingerprint()
    problems = [f"{report.node} did not respond: {report.error}" for report in reports if report.error]
    for report in reports:
        node = report.fingerprint
        differences = [
            f"{name} {node[name]} (driver {version})"
            for name, version in driver.items()
            if name in node and node[name] != version
        ]
        if differences:
            problems.append(f"{report.node} has {' and '.join(differences)}")
    if problems:
        fix = (
            "use the same image on every node, or submit the code as the working directory of the job, as "
            "`vz-ray submit` does"
        )
        return CheckResult("versions", CheckStatus.FAILED, join_first(problems, _MAX_LISTED), fix)
    versions = ", ".join(f"{name} {version}" for name, version in driver.items())
    return CheckResult("versions", CheckStatus.OK, f"the same on {len(reports)} nodes: {versions}")


def _check_volumes(config: ClusterConfig, reports: Sequence[NodeReport]) -> CheckResult:
    problems = [f"{report.node}: {problem}" for report in reports for problem in report.problems]
    runs = runs_directory(config)
    if runs is not None and RAY_WORKING_DIR_NAME in runs.parts:
        detail = f"the run directory {runs} is in the job's working directory, which is deleted with the job"
        fix = "set an absolute path on a volume that outlives the job: runs=/shared/runs"
        return CheckResult("volumes", CheckStatus.FAILED, detail, fix)
    if runs is not None and (error := write_error(runs)):
        problems.insert(0, f"driver: {error}")
    if runs is not None and not problems and (shortage := _disk_shortage(config, runs)):
        problems.append(shortage)
    if problems:
        fix = "mount the volumes of models and runs at these paths on every node, writable and with enough free space"
        return CheckResult("volumes", CheckStatus.FAILED, join_first(problems, _MAX_LISTED), fix)
    volumes = [f"runs {runs}"] if runs else []
    volumes += [f"model {config.model}"] if config.model else []
    return CheckResult("volumes", CheckStatus.OK, f"{', '.join(volumes)}: on every node that needs them")


def _check_secrets(config: ClusterConfig, reports: Sequence[NodeReport]) -> list[CheckResult]:
    env_vars = _key_env_vars(config)
    if not env_vars:
        return []
    problems = [
        f"{report.node} lacks {' and '.join(report.missing_env_vars)}" for report in reports if report.missing_env_vars
    ]
    if problems:
        fix = "set it in the environment of the node processes, from a Secret of the cluster"
        return [CheckResult("secrets", CheckStatus.FAILED, join_first(problems, _MAX_LISTED), fix)]
    detail = f"{', '.join(env_vars)}: set on all nodes with rollout workers"
    return [CheckResult("secrets", CheckStatus.OK, detail)]


def _disk_shortage(config: ClusterConfig, runs: Path) -> str:
    """Return an error if the volume is too small for the run's checkpoints, estimated from the model size."""
    if not isinstance(config, GrpoRunConfig | SftRunConfig):
        return ""
    num_checkpoints = 1 + (
        config.train.keep_checkpoints + config.train.keep_best
        if isinstance(config, GrpoRunConfig)
        else config.sft.keep_checkpoints
    )
    needed = checkpoint_bytes(config.model) * _CHECKPOINT_PARTS * num_checkpoints
    free = shutil.disk_usage(runs).free
    if free >= needed:
        return ""
    return (
        f"{runs} has {free / GIB:.1f} GiB free; {num_checkpoints} checkpoints of this model need about "
        f"{needed / GIB:.1f} GiB"
    )


def _check_shared_memory(config: ClusterConfig, reports: Sequence[NodeReport]) -> list[CheckResult]:
    """Check that two weight versions fit into the shared memory of the nodes with rollout workers."""
    if not isinstance(config, RolloutRunConfig) or config.weights.shm_dir:
        return []
    node_group, needed = config.rollout.node_group, 2 * checkpoint_bytes(config.model)
    worker_nodes = [
        report for report in reports if not report.error and (not node_group or node_group in report.node_groups)
    ]
    too_small = [
        f"{report.node} has {report.shm_free_bytes / GIB:.1f} GiB"
        for report in worker_nodes
        if report.shm_free_bytes < needed
    ]
    if too_small:
        detail = (
            f"two sets of weights need {needed / GIB:.1f} GiB of /dev/shm; {join_first(too_small, _MAX_LISTED)} free"
        )
        fix = "mount an emptyDir with medium Memory (docker run --shm-size), or set weights.shm_dir"
        return [CheckResult("shared memory", CheckStatus.FAILED, detail, fix)]
    detail = f"two sets of weights need {needed / GIB:.2f} GiB"
    return [CheckResult("shared memory", CheckStatus.OK, detail)]
