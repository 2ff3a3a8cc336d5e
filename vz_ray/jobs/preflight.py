"""Whether a run fits on the cluster that this process has joined, in seconds rather than by a hang.

nodes        are there any, and an autoscaler that brings more
placement    would every actor find a place: now, with nodes to come, or never
versions     does every node run this driver's code, Ray and vLLM
volumes      is the model there, is the run directory one shared volume that can be written
secrets      are the variables set that hold keys
memory       does a set of weights fit into the nodes' shared memory
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
from vz_ray.jobs.node_survey import NodeQuery, NodeReport, survey_nodes, write_error
from vz_ray.jobs.resource_demands import ClusterConfig, ResourceDemand, checkpoint_bytes, resource_demands
from vz_ray.monitoring.checks import CheckResult, CheckStatus
from vz_ray.utils.code_fingerprint import code_fingerprint

GIB = 1 << 30
_CHECKPOINT_PARTS = 6
"""Bytes of a checkpoint for each byte of bfloat16 weights: float32 weights and two moments."""
RAY_WORKING_DIR_NAME = "working_dir_files"
"""Ray's directory of the working directories of jobs."""
RELEASE_TIMEOUT_S = 20.0
"""How long a run that has just ended may take to give back what it had."""
_NAMED = 4
"""Nodes that one line names."""


async def preflight(config: ClusterConfig, *, gpus: bool, gpu_share: float = 1.0) -> list[CheckResult]:
    """Everything that can be known before a run starts; needs a `ray.init` before.

    Args:
        config: Of the run.
        gpus: Whether engines and ranks get GPUs.
        gpu_share: What a rank and an engine each have of one.

    Raises:
        UserError: The cluster's control service does not answer.
    """
    needs = [need for need in resource_demands(config, gpus=gpus, gpu_share=gpu_share) if need.max_count]
    state = await asyncio.to_thread(get_autoscaler_state)
    nodes = alive_nodes()
    checks = [_nodes(nodes, state), *await check_placement(needs, nodes, state)]
    with _marked(runs_directory(config)) as shared:
        groups = sorted({need.node_group for need in needs if need.node_group})
        answers = await survey_nodes(nodes, node_queries(config, needs, shared), groups)
    checks += [_versions(answers), _volumes(config, answers)]
    return [*checks, *_secrets(config, answers), *_shared_memory(config, answers)]


def alive_nodes() -> list[Mapping[str, Any]]:
    """Ray's own account of the nodes that are there and stay."""
    from ray._private.state import state  # Ray offers it nowhere else

    leaving = state.get_draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def _nodes(nodes: Sequence[Mapping[str, Any]], state: AutoscalerState) -> CheckResult:
    gpus = sum(node["Resources"].get("GPU", 0) for node in nodes)
    cpus = sum(node["Resources"].get("CPU", 0) for node in nodes)
    more = "an autoscaler brings more" if state.enabled else "no autoscaler brings more"
    found = f"{len(nodes)} with {cpus:g} CPU and {gpus:g} GPU in all; {more}"
    if state.launch_failures:
        return CheckResult(
            "nodes", CheckStatus.WARNING, found, f"one could not be started: {state.launch_failures[-1]}"
        )
    return CheckResult("nodes", CheckStatus.OK, found)


async def check_placement(
    needs: Sequence[ResourceDemand], nodes: Sequence[Mapping[str, Any]], state: AutoscalerState
) -> list[CheckResult]:
    """A check for each need; the autoscaler is asked where there is one, and something has no place yet."""
    from ray._private.state import available_resources_per_node  # Ray offers only their sum

    until = time.monotonic() + RELEASE_TIMEOUT_S
    while True:
        free = available_resources_per_node()
        fits = place_demands(
            needs, [n["Resources"] for n in nodes], [free.get(n["NodeID"], {}) for n in nodes]
        )
        taken = [found for found in fits if not found.complete and found.feasible]
        if not taken or state.enabled or time.monotonic() > until:
            break
        await asyncio.sleep(1.0)
    open_ = [found.demand for found in fits if not found.complete]
    if open_ and state.enabled:
        state = await request_resources(open_)
    never = infeasible_demands(open_, state)
    return [_placed(found, state, infeasible=found.demand in never) for found in fits]


def _placed(found: PlacementResult, state: AutoscalerState, *, infeasible: bool) -> CheckResult:
    need = found.demand
    if found.complete:
        more = f" (up to {need.max_count})" if need.max_count > need.min_count else ""
        where = (
            f" on {found.node_count} nodes"
            if found.node_count > 1
            else " on one node"
            if found.node_count
            else ""
        )
        return CheckResult(need.name, CheckStatus.OK, f"{need}{more}: room{where}")
    partly = f"{need}: {found.placed} of them find a place"
    if infeasible:
        fix = f"no node type of the autoscaler has room for one; of the nodes there are, {found.reason}"
        return CheckResult(need.name, CheckStatus.FAILED, partly, fix)
    if state.enabled:
        failed = f"; one could not be started: {state.launch_failures[-1]}" if state.launch_failures else ""
        coming = (
            f"{state.pending_nodes} nodes are being started"
            if state.pending_nodes
            else "the autoscaler looks for nodes"
        )
        return CheckResult(need.name, CheckStatus.WARNING, f"{partly}; {coming}{failed}")
    fix = f"{found.reason} (an autoscaler would be asked if it were Ray's version 2)"
    return CheckResult(need.name, CheckStatus.FAILED, partly, fix)


@contextmanager
def _marked(folder: Path | None) -> Iterator[tuple[str, str] | None]:
    """A file in the run directory's volume, by which nodes tell whether they see the same one."""
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
    """Where run directories are made; a server has none."""
    return None if isinstance(config, ServeConfig) else Path(config.runs).absolute()


def node_queries(
    config: ClusterConfig, needs: Sequence[ResourceDemand], shared: tuple[str, str] | None
) -> dict[str, NodeQuery]:
    """What nodes are asked, by group: the model of engines and ranks, the run directory of ranks."""
    # Relative ones are in the working directory, which each node has at a path of its own.
    model = [config.model] if config.model else []
    asked: dict[str, NodeQuery] = {}
    for need in needs:
        readable = model if need.name in ("learner ranks", "rollout workers", "agents") else []
        ranks = need.name == "learner ranks"
        before = asked.get(need.node_group, NodeQuery())
        asked[need.node_group] = NodeQuery(
            readable=sorted({*before.readable, *readable}),
            writable=[str(Path(shared[0]).parent)] if ranks and shared else before.writable,
            shared_file=shared if ranks else before.shared_file,
            env_vars=_variables(config) if need.name == "rollout workers" else before.env_vars,
        )
    return asked


def _variables(config: ClusterConfig) -> list[str]:
    """Environment variables that hold keys which rollout workers need."""
    if not isinstance(config, RolloutRunConfig):
        return []
    judge = config.reward.judge
    return [judge.api_key_env] if judge.model and judge.api_key_env else []


def _versions(answers: Sequence[NodeReport]) -> CheckResult:
    ours = code_fingerprint()
    wrong = [f"{one.node} did not answer: {one.error}" for one in answers if one.error]
    for one in answers:
        there = one.fingerprint
        differ = [name for name in ours if name in there and there[name] != ours[name]]
        if differ:
            wrong.append(
                one.node + " has " + " and ".join(f"{n} {there[n]} (here {ours[n]})" for n in differ)
            )
    if wrong:
        fix = (
            "give every node the same image, or send the code along as the working directory of the job, "
            "as `vz-ray submit` does"
        )
        return CheckResult("versions", CheckStatus.FAILED, _listed(wrong), fix)
    told = ", ".join(f"{name} {version}" for name, version in ours.items())
    return CheckResult("versions", CheckStatus.OK, f"the same on {len(answers)} nodes: {told}")


def _volumes(config: ClusterConfig, answers: Sequence[NodeReport]) -> CheckResult:
    wrong = [f"{one.node}: {trouble}" for one in answers for trouble in one.problems]
    runs = runs_directory(config)
    if runs is not None and RAY_WORKING_DIR_NAME in runs.parts:
        fix = "give an absolute path on a volume that outlives the job: runs=/shared/runs"
        found = f"the run directory is {runs}, in the job's working directory, which ends with it"
        return CheckResult("volumes", CheckStatus.FAILED, found, fix)
    if runs is not None and (trouble := write_error(runs)):
        wrong.insert(0, f"the driver: {trouble}")
    if runs is not None and not wrong and (short := _too_full(config, runs)):
        wrong.append(short)
    if wrong:
        fix = (
            "mount the volumes of models and runs on every node at these paths, writable, with room to spare"
        )
        return CheckResult("volumes", CheckStatus.FAILED, _listed(wrong), fix)
    told = [f"runs {runs}"] if runs else []
    told += [f"model {config.model}"] if config.model else []
    return CheckResult("volumes", CheckStatus.OK, ", ".join(told) + ": there on every node that needs them")


def _secrets(config: ClusterConfig, answers: Sequence[NodeReport]) -> list[CheckResult]:
    wanted = _variables(config)
    if not wanted:
        return []
    wrong = [
        f"{one.node} lacks {' and '.join(one.missing_env_vars)}" for one in answers if one.missing_env_vars
    ]
    if wrong:
        fix = "set it in the environment of the nodes' processes, from a Secret of the cluster"
        return [CheckResult("secrets", CheckStatus.FAILED, _listed(wrong), fix)]
    return [CheckResult("secrets", CheckStatus.OK, f"{', '.join(wanted)}: set where workers are")]


def _too_full(config: ClusterConfig, runs: Path) -> str:
    """Whether the checkpoints of a run find room, as far as the size of its model tells."""
    if not isinstance(config, GrpoRunConfig | SftRunConfig):
        return ""
    kept = 1 + (
        config.train.keep_checkpoints + config.train.keep_best
        if isinstance(config, GrpoRunConfig)
        else config.sft.keep_checkpoints
    )
    needed, free = checkpoint_bytes(config.model) * _CHECKPOINT_PARTS * kept, shutil.disk_usage(runs).free
    if free >= needed:
        return ""
    return (
        f"{runs} has {free / GIB:.1f} GiB free, and {kept} checkpoints of this model take about "
        f"{needed / GIB:.1f} GiB"
    )


def _shared_memory(config: ClusterConfig, answers: Sequence[NodeReport]) -> list[CheckResult]:
    """Whether versions of the weights fit into the shared memory of nodes with workers."""
    if not isinstance(config, RolloutRunConfig) or config.weights.shm_dir:
        return []
    group, needed = config.rollout.node_group, 2 * checkpoint_bytes(config.model)
    there = [one for one in answers if not one.error and (not group or group in one.node_groups)]
    small = [
        f"{one.node} has {one.shm_free_bytes / GIB:.1f} GiB" for one in there if one.shm_free_bytes < needed
    ]
    if small:
        found = f"two sets of weights take {needed / GIB:.1f} GiB of /dev/shm; {_listed(small)} free"
        fix = "mount an emptyDir with medium Memory there (docker run --shm-size), or set weights.shm_dir"
        return [CheckResult("shared memory", CheckStatus.FAILED, found, fix)]
    return [
        CheckResult("shared memory", CheckStatus.OK, f"two sets of weights take {needed / GIB:.2f} GiB of it")
    ]


def _listed(found: Sequence[str]) -> str:
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(found[:_NAMED]) + more
