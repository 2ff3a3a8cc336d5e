"""Fixtures: each example of k8s/."""

from __future__ import annotations

import pytest

from tests.cluster.manifests import EXAMPLES, example
from vz_ray.k8s.manifest import Manifest, Workload, workload_of


@pytest.fixture(params=EXAMPLES)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    """Objects of each example."""
    return example(request.param)


@pytest.fixture
def workload(manifests: list[Manifest]) -> Workload:
    """Workload of each example."""
    return workload_of(manifests)
