"""Pods of each node group: number, CPUs, GPUs, memory, disks, time to stop. Pure.

A group's pods hold the actors of one or two kinds:

    learner   ranks; with shared GPUs also engines
    rollout   one engine
    teacher   one engine of the teacher
    clips     decoders
    serve     one served engine and its decoders

Without nodes for CPUs, decoders are in the first group. Memory is the sum over the actors of a pod and /dev/shm, which
counts as memory. Sizes of models and states come from the planner, those of processes are assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from vz_ray.config.rollout import EngineConfig
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.config.site import NodeTypeConfig, SiteConfig
from vz_ray.families import load_model_shape
from vz_ray.jobs.resource_demands import ResourceDemand, resource_demands
from vz_ray.k8s.pod_group import ClusterSize, PodGroup, check_fits
from vz_ray.k8s.run_spec import RunSpec
from vz_ray.planning.assumptions import Assumptions
from vz_ray.planning.gpu_figures import require_gpu
from vz_ray.planning.gpu_memory import GIB
from vz_ray.planning.planner import ResourcePlan, make_plan
from vz_ray.planning.timeouts import plan_stop
from vz_ray.utils.errors import UserError

CPUS_PER_GPU = 8
"""CPUs of a pod per GPU, as far as the node has them: engines and ranks use more than they reserve."""
MAX_CLIPS_CPUS = 16
"""Maximum CPUs of a pod with decoders."""
RANK_GIB, ENGINE_GIB, DECODER_GIB = (8.0, 2.0), (12.0, 2.5), 0.5
"""Assumed memory of a process beside its states: with a GPU, without. Decoders add their frame cache and `max_rss_mib`
bounds them."""
HEAD_GIB = (28.0, 2.0)
"""Assumed memory of the driver and Ray's services, with and without GPUs."""
OBJECT_STORE_GIB, HEAD_OBJECT_STORE_GIB = 8.0, 4.0
"""Ray's object store of a pod in a run with GPUs; without GPUs `ray.object_store_mib`."""
WORK_DISK_GIB, SMALL_DISK_GIB = 50.0, 2.0
"""Disk for compiler caches and spilled objects, with and without GPUs."""
MIN_STOP_S = 120
"""Minimum time to stop: episodes are cancelled, engines and the driver exit."""
WEIGHT_VERSIONS = 2
"""Versions of published weights in shared memory."""
STOP_MARGIN_S = 30
"""Time between Ray's kill of a job and the end of the hook that waits for it, and again until the end of the pod."""
IDLE_S = 300
"""Idle time after which the autoscaler removes a pod: engines take minutes to start."""


def size_cluster(run: RunSpec, site: SiteConfig) -> ClusterSize:
    """Return the pods of a run.

    Raises:
        UserError: The run does not fit its GPUs, or a pod fits no node of the site.
    """
    assumptions = replace(Assumptions(), storage_gbps=site.storage_gbps)
    if run.gpus:
        assumptions = assumptions.with_gpu(require_gpu(site.gpu_node.gpu))
    plan, stop_s, reason = None, MIN_STOP_S, "the minimum"
    if isinstance(run.config, GrpoRunConfig | SftRunConfig):
        plan = make_plan(run.config, assumptions, run.shape)
        if run.gpus and not plan.fits:
            over = max(plan.learner_bytes_over, plan.engine_bytes_over) / GIB
            raise UserError(
                f"the run needs {over:.1f} GiB more memory than a {assumptions.gpu} has; `vz-ray plan` lists changes "
                "that fit"
            )
        planned_s, reason = plan_stop(run.config, assumptions, run.shape)
        stop_s = math.ceil(max(MIN_STOP_S, planned_s))
    groups = tuple(_Sizer(run, site, plan).groups())
    head = _head(run, site)
    for group in (head, *groups):
        check_fits(group, site)
    return ClusterSize(head, groups, stop_s, reason)


def _head(run: RunSpec, site: SiteConfig) -> PodGroup:
    store = min(HEAD_OBJECT_STORE_GIB, _object_store_gib(run))
    memory = math.ceil(HEAD_GIB[not run.gpus] + store)
    cpus = min(8.0, site.cpu_node.cpus or site.gpu_node.cpus) if run.gpus else 1.0
    disk = 30 if run.gpus else math.ceil(SMALL_DISK_GIB)
    return PodGroup("head", 1, 1, cpus, 0, memory, max(1, math.ceil(store)), store, disk)


def _object_store_gib(run: RunSpec) -> float:
    return OBJECT_STORE_GIB if run.gpus else run.config.ray.object_store_mib / 1024


class _Sizer:
    """Sizes of the worker groups of one run."""

    def __init__(self, run: RunSpec, site: SiteConfig, plan: ResourcePlan | None) -> None:
        self._run, self._site, self._plan = run, site, plan

    def groups(self) -> Iterator[PodGroup]:
        """Yield the groups, decoders last."""
        *actors, decoders = resource_demands(self._run.config, gpus=self._run.gpus)
        alone = decoders.node_group == "clips"
        for index, demand in enumerate(actors):
            yield self._group(demand, None if alone or index else decoders)
        if alone:
            yield self._clips(decoders)

    def _group(self, demand: ResourceDemand, decoders: ResourceDemand | None) -> PodGroup:
        """Return the group of ranks or engines, with `decoders` in its pods."""
        run, node = self._run, self._site.gpu_node if self._run.gpus else self._site.cpu_node
        per_pod, pods = self._actors_per_pod(demand, node)
        gpus = math.ceil(per_pod * demand.resources["GPU"])
        cpus = per_pod * demand.resources["CPU"]
        num_decoders = 0
        if decoders is not None:
            served = isinstance(run.config, ServeConfig)
            num_decoders = run.config.clips.num_actors if served else math.ceil(decoders.max_count / max(pods))
            cpus += num_decoders * decoders.resources["CPU"]
        if not gpus and not demand.gang:
            cpus = max(cpus, self._engine(demand.node_group).num_threads)
        if gpus:
            cpus = max(cpus, min(CPUS_PER_GPU * gpus, node.cpus * gpus / node.gpus))
        shm = self._shm_gib(demand.node_group)
        memory = per_pod * self._actor_gib(demand) + num_decoders * self._decoder_gib() + shm
        scratch = WORK_DISK_GIB if run.gpus else SMALL_DISK_GIB
        if num_decoders:
            scratch += self._cache_gib()
        return PodGroup(
            name=demand.node_group,
            min_pods=pods[0],
            max_pods=pods[1],
            cpus=_round_cpus(cpus),
            gpus=gpus,
            memory_gib=_round_up(memory, 8 if gpus else 1),
            shm_gib=math.ceil(shm),
            object_store_gib=_object_store_gib(run),
            scratch_gib=math.ceil(scratch),
            spot=run.request.spot and demand.node_group == "rollout",
        )

    def _actors_per_pod(self, demand: ResourceDemand, node: NodeTypeConfig) -> tuple[int, tuple[int, int]]:
        """Return the actors of a pod, and the minimum and maximum number of pods.

        Ranks are spread evenly over as few pods as possible; every engine has a pod.
        """
        if not demand.gang:
            return 1, (demand.min_count, demand.max_count)
        per_node = node.gpus if self._run.gpus else demand.max_count
        pods = math.ceil(demand.max_count / per_node)
        return math.ceil(demand.max_count / pods), (pods, pods)

    def _clips(self, decoders: ResourceDemand) -> PodGroup:
        cpus_each = decoders.resources["CPU"]
        per_pod = decoders.max_count
        if cpus_each:
            limit = min(MAX_CLIPS_CPUS, self._site.cpu_node.cpus)
            per_pod = max(1, min(per_pod, int(limit / cpus_each)))
        shm = 2 * _object_store_gib(self._run)
        memory = per_pod * self._decoder_gib() + shm
        return PodGroup(
            name="clips",
            min_pods=math.ceil(decoders.min_count / per_pod),
            max_pods=math.ceil(decoders.max_count / per_pod),
            cpus=_round_cpus(max(1.0, per_pod * cpus_each)),
            gpus=0,
            memory_gib=math.ceil(memory),
            shm_gib=math.ceil(shm),
            object_store_gib=_object_store_gib(self._run),
            scratch_gib=math.ceil(self._cache_gib() + (WORK_DISK_GIB if self._run.gpus else SMALL_DISK_GIB)),
        )

    def _actor_gib(self, demand: ResourceDemand) -> float:
        """Return the memory of one rank or engine; with shared GPUs of both."""
        total = 0.0
        if demand.gang:
            assert self._plan is not None
            total += self._plan.host_bytes / GIB + RANK_GIB[not self._run.gpus]
            if self._run.shares_gpus:
                total += self._engine_gib()
            return total
        return self._engine_gib(demand.node_group)

    def _engine_gib(self, node_group: str = "rollout") -> float:
        """Return the memory of an engine: process, cache of frames, and weights that it reads."""
        engine, nbytes = self._engine(node_group), 2 if self._run.gpus else 4
        shape = self._run.shape if node_group != "teacher" else load_model_shape(self._run.config.teacher.model)
        total = ENGINE_GIB[not self._run.gpus] + engine.mm_processor_cache_gib + nbytes * shape.parameters / GIB
        return total if self._run.gpus else total + (engine.kv_cache_gib or 0.0)

    def _engine(self, node_group: str) -> EngineConfig:
        config = self._run.config
        if isinstance(config, ServeConfig):
            engine: EngineConfig = config.engine
        else:
            engine = (config.teacher if node_group == "teacher" else config.rollout).engine
        return engine

    def _decoder_gib(self) -> float:
        clips = self._run.config.clips
        used = DECODER_GIB + clips.memory_cache_mib / 1024
        return max(used, clips.max_rss_mib / 1024) if self._run.gpus else used

    def _cache_gib(self) -> float:
        clips = self._run.config.clips
        return float(clips.disk_cache_gib + clips.download_cache_gib)

    def _shm_gib(self, node_group: str) -> float:
        """Return the size of /dev/shm: Ray's objects, and published weights where engines or rank 0 are."""
        size = _object_store_gib(self._run)
        if isinstance(self._run.config, GrpoRunConfig) and node_group in ("learner", "rollout"):
            nbytes = 2 if self._run.gpus else 4
            size += WEIGHT_VERSIONS * nbytes * self._run.shape.parameters / GIB
        # vLLM's preprocessing and NCCL use some as well.
        return size + (4.0 if self._run.gpus else 0.25)


def _round_up(value: float, step: int) -> int:
    return math.ceil(value / step) * step


def _round_cpus(cpus: float) -> float:
    return math.ceil(2 * cpus) / 2
