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

from vz_ray.config.run import PlayConfig, RunConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.jobs.autoscaler import Scaling, ask_for, infeasible_of, scaling
from vz_ray.jobs.fit import Fit, fit
from vz_ray.jobs.needs import ClusterConfig, Need, model_bytes, needs_of
from vz_ray.jobs.survey import Answers, Questions, survey, unwritable
from vz_ray.observe.checks import Check, Verdict
from vz_ray.observe.fingerprint import fingerprint

GIB = 1 << 30
_CHECKPOINT_PARTS = 6
"""Bytes of a checkpoint for each byte of bfloat16 weights: float32 weights and two moments."""
WORKING_DIR = "working_dir_files"
"""Ray's directory of the working directories of jobs."""
TAKEN_S = 20.0
"""How long a run that has just ended may take to give back what it had."""
_NAMED = 4
"""Nodes that one line names."""


async def preflight(config: ClusterConfig, *, gpus: bool, gpu_share: float = 1.0) -> list[Check]:
    """Everything that can be known before a run starts; needs a `ray.init` before.

    Args:
        config: Of the run.
        gpus: Whether engines and ranks get GPUs.
        gpu_share: What a rank and an engine each have of one.

    Raises:
        UserError: The cluster's control service does not answer.
    """
    needs = [need for need in needs_of(config, gpus=gpus, gpu_share=gpu_share) if need.most]
    state = await asyncio.to_thread(scaling)
    nodes = alive()
    checks = [_nodes(nodes, state), *await placement(needs, nodes, state)]
    with _marked(runs_of(config)) as shared:
        groups = sorted({need.group for need in needs if need.group})
        answers = await survey(nodes, questions(config, needs, shared), groups)
    checks += [_versions(answers), _volumes(config, answers)]
    return [*checks, *_secrets(config, answers), *_shared_memory(config, answers)]


def alive() -> list[Mapping[str, Any]]:
    """Ray's own account of the nodes that are there and stay."""
    from ray._private.state import state  # Ray offers it nowhere else

    leaving = state.get_draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def _nodes(nodes: Sequence[Mapping[str, Any]], state: Scaling) -> Check:
    gpus = sum(node["Resources"].get("GPU", 0) for node in nodes)
    cpus = sum(node["Resources"].get("CPU", 0) for node in nodes)
    more = "an autoscaler brings more" if state.alive else "no autoscaler brings more"
    found = f"{len(nodes)} with {cpus:g} CPU and {gpus:g} GPU in all; {more}"
    if state.failed:
        return Check("nodes", Verdict.NOTE, found, f"one could not be started: {state.failed[-1]}")
    return Check("nodes", Verdict.OK, found)


async def placement(needs: Sequence[Need], nodes: Sequence[Mapping[str, Any]], state: Scaling) -> list[Check]:
    """A check for each need; the autoscaler is asked where there is one, and something has no place yet."""
    from ray._private.state import available_resources_per_node  # Ray offers only their sum

    until = time.monotonic() + TAKEN_S
    while True:
        free = available_resources_per_node()
        fits = fit(needs, [n["Resources"] for n in nodes], [free.get(n["NodeID"], {}) for n in nodes])
        taken = [found for found in fits if not found.whole and found.ever]
        if not taken or state.alive or time.monotonic() > until:
            break
        await asyncio.sleep(1.0)
    open_ = [found.need for found in fits if not found.whole]
    if open_ and state.alive:
        state = await ask_for(open_)
    never = infeasible_of(open_, state)
    return [_placed(found, state, infeasible=found.need in never) for found in fits]


def _placed(found: Fit, state: Scaling, *, infeasible: bool) -> Check:
    need = found.need
    if found.whole:
        more = f" (up to {need.most})" if need.most > need.count else ""
        where = f" on {found.nodes} nodes" if found.nodes > 1 else " on one node" if found.nodes else ""
        return Check(need.who, Verdict.OK, f"{need}{more}: room{where}")
    partly = f"{need}: {found.placed} of them find a place"
    if infeasible:
        fix = f"no node type of the autoscaler has room for one; of the nodes there are, {found.why}"
        return Check(need.who, Verdict.PROBLEM, partly, fix)
    if state.alive:
        failed = f"; one could not be started: {state.failed[-1]}" if state.failed else ""
        coming = (
            f"{state.pending} nodes are being started" if state.pending else "the autoscaler looks for nodes"
        )
        return Check(need.who, Verdict.NOTE, f"{partly}; {coming}{failed}")
    fix = f"{found.why} (an autoscaler would be asked if it were Ray's version 2)"
    return Check(need.who, Verdict.PROBLEM, partly, fix)


@contextmanager
def _marked(folder: Path | None) -> Iterator[tuple[str, str] | None]:
    """A file in the run directory's volume, by which nodes tell whether they see the same one."""
    if folder is None or unwritable(folder):
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


def runs_of(config: ClusterConfig) -> Path | None:
    """Where run directories are made; a server has none."""
    return None if isinstance(config, ServeConfig) else Path(config.runs).absolute()


def questions(
    config: ClusterConfig, needs: Sequence[Need], shared: tuple[str, str] | None
) -> dict[str, Questions]:
    """What nodes are asked, by group: the model of engines and ranks, the run directory of ranks."""
    # Relative ones are in the working directory, which each node has at a path of its own.
    model = [config.model] if config.model else []
    asked: dict[str, Questions] = {}
    for need in needs:
        readable = model if need.who in ("learner ranks", "rollout workers", "agents") else []
        ranks = need.who == "learner ranks"
        before = asked.get(need.group, Questions())
        asked[need.group] = Questions(
            readable=sorted({*before.readable, *readable}),
            writable=[str(Path(shared[0]).parent)] if ranks and shared else before.writable,
            shared=shared if ranks else before.shared,
            variables=_variables(config) if need.who == "rollout workers" else before.variables,
        )
    return asked


def _variables(config: ClusterConfig) -> list[str]:
    """Environment variables that hold keys which rollout workers need."""
    if not isinstance(config, PlayConfig):
        return []
    judge = config.reward.judge
    return [judge.api_key_env] if judge.model and judge.api_key_env else []


def _versions(answers: Sequence[Answers]) -> Check:
    ours = fingerprint()
    wrong = [f"{one.node} did not answer: {one.silent}" for one in answers if one.silent]
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
        return Check("versions", Verdict.PROBLEM, _listed(wrong), fix)
    told = ", ".join(f"{name} {version}" for name, version in ours.items())
    return Check("versions", Verdict.OK, f"the same on {len(answers)} nodes: {told}")


def _volumes(config: ClusterConfig, answers: Sequence[Answers]) -> Check:
    wrong = [f"{one.node}: {trouble}" for one in answers for trouble in one.troubles]
    runs = runs_of(config)
    if runs is not None and WORKING_DIR in runs.parts:
        fix = "give an absolute path on a volume that outlives the job: runs=/shared/runs"
        found = f"the run directory is {runs}, in the job's working directory, which ends with it"
        return Check("volumes", Verdict.PROBLEM, found, fix)
    if runs is not None and (trouble := unwritable(runs)):
        wrong.insert(0, f"the driver: {trouble}")
    if runs is not None and not wrong and (short := _too_full(config, runs)):
        wrong.append(short)
    if wrong:
        fix = (
            "mount the volumes of models and runs on every node at these paths, writable, with room to spare"
        )
        return Check("volumes", Verdict.PROBLEM, _listed(wrong), fix)
    told = [f"runs {runs}"] if runs else []
    told += [f"model {config.model}"] if config.model else []
    return Check("volumes", Verdict.OK, ", ".join(told) + ": there on every node that needs them")


def _secrets(config: ClusterConfig, answers: Sequence[Answers]) -> list[Check]:
    wanted = _variables(config)
    if not wanted:
        return []
    wrong = [f"{one.node} lacks {' and '.join(one.unset)}" for one in answers if one.unset]
    if wrong:
        fix = "set it in the environment of the nodes' processes, from a Secret of the cluster"
        return [Check("secrets", Verdict.PROBLEM, _listed(wrong), fix)]
    return [Check("secrets", Verdict.OK, f"{', '.join(wanted)}: set where workers are")]


def _too_full(config: ClusterConfig, runs: Path) -> str:
    """Whether the checkpoints of a run find room, as far as the size of its model tells."""
    if not isinstance(config, RunConfig | SftRunConfig):
        return ""
    kept = 1 + (
        config.train.keep_checkpoints + config.train.keep_best
        if isinstance(config, RunConfig)
        else config.sft.keep_checkpoints
    )
    needed, free = model_bytes(config.model) * _CHECKPOINT_PARTS * kept, shutil.disk_usage(runs).free
    if free >= needed:
        return ""
    return (
        f"{runs} has {free / GIB:.1f} GiB free, and {kept} checkpoints of this model take about "
        f"{needed / GIB:.1f} GiB"
    )


def _shared_memory(config: ClusterConfig, answers: Sequence[Answers]) -> list[Check]:
    """Whether versions of the weights fit into the shared memory of nodes with workers."""
    if not isinstance(config, PlayConfig) or config.weights.directory:
        return []
    group, needed = config.rollout.group, 2 * model_bytes(config.model)
    there = [one for one in answers if not one.silent and (not group or group in one.groups)]
    small = [f"{one.node} has {one.shm_free / GIB:.1f} GiB" for one in there if one.shm_free < needed]
    if small:
        found = f"two sets of weights take {needed / GIB:.1f} GiB of /dev/shm; {_listed(small)} free"
        fix = "mount an emptyDir with medium Memory there (docker run --shm-size), or set weights.directory"
        return [Check("shared memory", Verdict.PROBLEM, found, fix)]
    return [Check("shared memory", Verdict.OK, f"two sets of weights take {needed / GIB:.2f} GiB of it")]


def _listed(found: Sequence[str]) -> str:
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(found[:_NAMED]) + more
