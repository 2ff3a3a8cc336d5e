"""Pre-flight checks of the cluster's GPUs: MIG slices, and memory against the plan of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.jobs.gpu_checks import Gpu
from vz_ray.jobs.node_survey import NodeReport
from vz_ray.jobs.resource_demands import ClusterConfig
from vz_ray.monitoring.checks import CheckResult, CheckStatus
from vz_ray.planning.advice import advise
from vz_ray.planning.assumptions import Assumptions
from vz_ray.planning.gpu_memory import GIB
from vz_ray.planning.planner import PlannableConfig, ResourcePlan, make_plan
from vz_ray.utils.errors import UserError


def check_gpus(config: ClusterConfig, reports: Sequence[NodeReport]) -> list[CheckResult]:
    """Check the GPUs that the nodes' drivers list; empty if no driver lists one, or the run trains no model."""
    gpus = [(report.node, gpu) for report in reports for gpu in report.gpus]
    if not gpus or not isinstance(config, GrpoRunConfig | SftRunConfig):
        return []
    slices = [(node, gpu) for node, gpu in gpus if gpu.mig]
    return [_check_mig(config, *slices[0])] if slices else [_check_memory(config, gpus)]


def _check_mig(config: PlannableConfig, node: str, gpu: Gpu) -> CheckResult:
    """Slices have no peer access: neither NCCL nor CUDA IPC works between them."""
    detail = f"{node}: GPU {gpu.index} ({gpu.name}) is split into MIG slices"
    connected = config.learner.world_size > 1
    fix = "set learner.world_size=1"
    if isinstance(config, GrpoRunConfig):
        connected |= config.weights.transport != "shm" or config.rollout.engine.tensor_parallel_size > 1
        fix += ", weights.transport=shm and rollout.engine.tensor_parallel_size=1"
    fix = f"disable MIG (`nvidia-smi -mig 0`), or {fix}, because slices have no peer access"
    return CheckResult("GPUs", CheckStatus.FAILED if connected else CheckStatus.WARNING, detail, fix)


def _check_memory(config: PlannableConfig, gpus: Sequence[tuple[str, Gpu]]) -> CheckResult:
    """Plan the run for the smallest GPU. What follows from shapes alone fails; an estimate warns."""
    node, gpu = min(gpus, key=lambda entry: entry[1].total_gib)
    assumptions = replace(Assumptions(), gpu_bytes=int(gpu.total_gib * GIB))
    try:
        plan = make_plan(config, assumptions)
    except UserError as error:
        return CheckResult("GPUs", CheckStatus.WARNING, f"{len(gpus)} GPUs, memory not planned", str(error))
    smallest = f"{gpu.name} with {gpu.total_gib:.0f} GiB"
    needs = ", ".join(f"{item.component} {item.peak_bytes / GIB:.0f} GiB" for item in plan.footprints)
    if plan.fits:
        return CheckResult("GPUs", CheckStatus.OK, f"{len(gpus)}, at least {smallest}: {needs}")
    certain = any(item.exact_bytes > item.capacity_bytes for item in plan.footprints)
    detail = f"{node} has {smallest}; estimated are {needs}"
    status = CheckStatus.FAILED if certain else CheckStatus.WARNING
    return CheckResult("GPUs", status, detail, _fix(config, plan, assumptions))


def _fix(config: PlannableConfig, plan: ResourcePlan, assumptions: Assumptions) -> str:
    changes = [advice.combined_change for advice in advise(config, plan, assumptions)]
    settings = [setting for change in changes if change is not None for setting in change.settings]
    if None in changes or not settings:
        return "use GPUs with more memory, or a smaller model; `vz-ray plan` shows what takes it"
    return f"set {' '.join(settings)}; `vz-ray plan` lists further changes"
