"""Body of `vz-ray preflight`: run the pre-flight checks on the current cluster and print the results."""

from __future__ import annotations

import asyncio

from rich.console import Console

from vz_ray.jobs.resource_demands import ClusterConfig
from vz_ray.monitoring.checks import CheckResult, check_table, failed_checks
from vz_ray.runtime.ray_cluster import preflight_checks, ray_cluster

_MIN_WIDTH = 120
"""Minimum width of the table if the output is not a terminal."""


def run_preflight(config: ClusterConfig) -> int:
    """Check whether a run can start on the cluster of this machine, and print a table.

    Returns:
        1 if a check failed, else 0.
    """
    checks = asyncio.run(_run_checks(config))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _MIN_WIDTH)
    console.print(check_table(checks))
    return 1 if failed_checks(checks) else 0


async def _run_checks(config: ClusterConfig) -> list[CheckResult]:
    async with ray_cluster(config.ray):
        return await preflight_checks(config)
