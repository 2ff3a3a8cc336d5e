"""GPU checks of the nodes of a cluster: driver, memory for engine and learner, other processes, MIG.

The state of the GPUs is what `nvidia-smi` on each node reports; see `gpu_checks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from vz_ray.config.distill import DistillRunConfig
from vz_ray.config.run import GrpoRunConfig, RolloutRunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.jobs.gpu_checks import Gpu, check_driver, check_gpu_memory, check_mig
from vz_ray.jobs.node_survey import NodeReport
from vz_ray.jobs.resource_demands import ClusterConfig, checkpoint_bytes
from vz_ray.monitoring.checks import CheckResult, CheckStatus
from vz_ray.planning.assumptions import Assumptions
from vz_ray.planning.gpu_memory import GIB
from vz_ray.planning.planner import ResourcePlan, make_plan
from vz_ray.utils.errors import UserError


def check_node_gpus(config: ClusterConfig, reports: Sequence[NodeReport]) -> list[CheckResult]:
    """Check the GPUs of all surveyed nodes; return one result if there is no problem, none without GPU nodes."""
    surveyed = [report for report in reports if report.driver is not None]
    gpus = [gpu for report in surveyed for gpu in _gpus_of(report)]
    problems = [check for report in surveyed for check in _driver_problems(report, _connects_gpus(config))]
    if not gpus:
        return problems
    smallest_gib = min(gpu.total_gib for gpu in gpus)
    try:
        needs = _needed_gib(config, smallest_gib)
    except UserError as error:
        needs = {}
        problems.append(CheckResult("GPU memory", CheckStatus.WARNING, f"not planned: {error}", "fix the config"))
    too_large = [_too_large(name, needed, smallest_gib) for name, needed in needs.items() if needed > smallest_gib]
    problems += too_large or _free_memory_problems(surveyed, min(needs.values(), default=0.0))
    if problems:
        return problems
    planned = "".join(f"; {component} needs {needed_gib:.1f} GiB" for component, needed_gib in needs.items())
    detail = f"{len(gpus)} of {smallest_gib:.1f} GiB or more ({gpus[0].name}){planned}"
    return [CheckResult("GPUs", CheckStatus.OK, detail)]


def _connects_gpus(config: ClusterConfig) -> bool:
    """Return whether NCCL or CUDA IPC connects GPUs, which MIG slices do not support."""
    if isinstance(config, GrpoRunConfig | SftRunConfig) and config.learner.world_size > 1:
        return True
    if isinstance(config, GrpoRunConfig) and config.weights.transport != "shm":
        return True
    return isinstance(config, RolloutRunConfig) and config.rollout.engine.tensor_parallel_size > 1


def _driver_problems(report: NodeReport, connects_gpus: bool) -> Iterator[CheckResult]:
    assert report.driver is not None
    mig_status = CheckStatus.FAILED if connects_gpus else CheckStatus.WARNING
    checks = [check_driver(report.driver, report.torch_cuda)]
    checks += [replace(mig, status=mig_status) for gpu in _gpus_of(report) for mig in check_mig(gpu)]
    yield from (_on_node(report, check) for check in checks if check.status is not CheckStatus.OK)


def _too_large(component: str, needed_gib: float, smallest_gib: float) -> CheckResult:
    detail = f"needs {needed_gib:.1f} GiB on each GPU; the smallest has {smallest_gib:.1f} GiB"
    fix = f"`vz-ray plan --gpu-memory {smallest_gib:.0f}GiB` with this config lists changes that help"
    return CheckResult(f"memory of {component}", CheckStatus.FAILED, detail, fix)


def _free_memory_problems(reports: Sequence[NodeReport], needed_gib: float) -> Iterator[CheckResult]:
    for report in reports:
        checks = [check_gpu_memory(gpu, needed_gib) for gpu in _gpus_of(report)]
        yield from (_on_node(report, check) for check in checks if check.status is not CheckStatus.OK)


def _gpus_of(report: NodeReport) -> tuple[Gpu, ...]:
    return report.driver.gpus if report.driver else ()


def _on_node(report: NodeReport, check: CheckResult) -> CheckResult:
    return replace(check, name=f"{check.name} of {report.node}")


def _needed_gib(config: ClusterConfig, gpu_gib: float) -> dict[str, float]:
    """Return the planned memory of each component on a GPU of this size.

    Raises:
        UserError: The model is unknown, or the config cannot be planned.
    """
    if isinstance(config, GrpoRunConfig | SftRunConfig):
        return _planned_gib(make_plan(config, Assumptions(gpu_bytes=int(gpu_gib * GIB))))
    if isinstance(config, DistillRunConfig):
        return {}
    engine = config.rollout.engine if isinstance(config, RolloutRunConfig) else config.engine
    if engine.kv_cache_gib is None:
        return {"engine": engine.gpu_memory_utilization * gpu_gib}
    return {"engine": engine.kv_cache_gib + checkpoint_bytes(config.model) / engine.tensor_parallel_size / GIB}


def _planned_gib(plan: ResourcePlan) -> dict[str, float]:
    needs = {footprint.component: footprint.peak_bytes / GIB for footprint in plan.footprints}
    if plan.engine is not None and not plan.engine.can_start:
        lacking_kv_tokens = max(0, plan.engine.min_kv_tokens - plan.engine.kv_tokens)
        needs[(plan.shared_gpu or plan.engine.footprint).component] += (
            lacking_kv_tokens * plan.engine.kv_bytes_per_token / GIB
        )
    return needs
