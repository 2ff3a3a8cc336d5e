"""Timeouts of a run that its config leaves to the plan; set and logged once, when the cluster is known."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from vz_ray.planning.assumptions import Assumptions, load_assumptions
from vz_ray.planning.gpu_figures import GPU_CHECK_FILE, find_gpu
from vz_ray.planning.timeouts import (
    PlannedTimeout,
    TimeoutRunConfig,
    apply_timeouts,
    minimum_timeouts,
    plan_timeouts,
)
from vz_ray.utils.errors import UserError

log = logging.getLogger(__name__)

ACCELERATOR = "accelerator_type:"
"""Prefix of Ray's resources that name a node's GPU."""


def set_timeouts(config: TimeoutRunConfig, *, gpus: bool, resources: Iterable[str]) -> None:
    """Set the timeouts that `config` leaves null, in place, and log all planned ones.

    Args:
        config: Config of the run.
        gpus: Engines and learner ranks use GPUs; otherwise the minimums apply.
        resources: Names of the cluster's resources in Ray.
    """
    timeouts = _plan(config, resources) if gpus else minimum_timeouts(config, "engines and learner run on CPUs")
    apply_timeouts(config, timeouts)
    for timeout in timeouts:
        log.info("%s", timeout)


def _plan(config: TimeoutRunConfig, resources: Iterable[str]) -> list[PlannedTimeout]:
    assumptions, warnings = run_assumptions(config, resources)
    for warning in warnings:
        log.warning("%s", warning)
    try:
        return plan_timeouts(config, assumptions)
    except UserError as error:
        return minimum_timeouts(config, f"no plan, because {error}")


def run_assumptions(config: TimeoutRunConfig, resources: Iterable[str]) -> tuple[Assumptions, list[str]]:
    """Return the assumptions for the slowest GPU of a cluster, with measured figures if there are any, and warnings."""
    names = sorted(name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR))
    specs = [spec for name in names if (spec := find_gpu(name))]
    slowest = min(specs, key=lambda spec: (spec.tflops, spec.memory_gbps), default=None)
    check_file = Path(config.runs) / GPU_CHECK_FILE
    assumptions, warnings = load_assumptions(check_file, gpu=slowest.name if slowest else "")
    if unknown := [name for name in names if find_gpu(name) is None]:
        measured = assumptions.measured_in or f"{assumptions.gpu}, assumed"
        warnings.append(f"The speed of GPU {unknown[0]} is unknown; timeouts follow from {measured}.")
    return assumptions, warnings
