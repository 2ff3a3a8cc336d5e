"""Quantities of Kubernetes as numbers."""

from __future__ import annotations

import pytest

from cluster.manifests.objects import quantity


@pytest.mark.parametrize(
    ("text", "number"),
    [("500m", 0.5), ("2Gi", 2.0**31), ("1k", 1000.0), (8, 8.0), ("1.5Mi", 1.5 * 2**20), ("1e3", 1000.0)],
)
def test_quantities_are_kubernetes_own(text, number):
    assert quantity(text) == number


@pytest.mark.parametrize("text", ["lots", "1gb", "", "-1", "1 Gi B"])
def test_what_is_no_quantity_is_refused(text):
    with pytest.raises(ValueError, match="is not a quantity"):
        quantity(text)
