"""Rendered overlays, each test's own copy of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cluster.manifests import render
from cluster.manifests.schema import ROOT

K8S = ROOT / "k8s"
Manifests = list[dict[str, Any]]


@cache
def _rendered(folders: tuple[Path, ...]) -> str:
    return json.dumps([manifest for folder in folders for manifest in render(folder)])


@pytest.fixture
def overlay() -> Callable[[str], Manifests]:
    """The manifests of an overlay, by name; rendered once."""
    return lambda name: json.loads(_rendered((K8S / "overlays" / name,)))


@pytest.fixture
def base() -> Callable[[str], Manifests]:
    """The manifests of a part of the base beside what all share."""
    return lambda name: json.loads(_rendered((K8S / "base" / "common", K8S / "base" / name)))
