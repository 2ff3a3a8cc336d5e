"""Fixtures: each overlay of k8s/, rendered."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.manifests import OVERLAYS, Manifest, Workload, load_entrypoint, render, workload_of


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    """Rendered manifests of each overlay."""
    return render(request.param)


@pytest.fixture
def workload(manifests: list[Manifest]) -> Workload:
    """Workload of each overlay."""
    return workload_of(manifests)


@pytest.fixture
def entrypoint(workload: Workload) -> tuple[Any, tuple[str, ...]]:
    """Loaded config and node groups of each overlay with an entrypoint."""
    loaded = load_entrypoint(workload)
    if loaded is None:
        pytest.skip("an interactive cluster has no entrypoint")
    return loaded
