"""Measurements of `vz-ray doctor --gpu`, on the host and with gloo."""

from __future__ import annotations

import pytest

from vz_ray.learner.gpu_measurements import measure_all_reduce, measure_devices


def test_device_figures_are_positive():
    figures = measure_devices("cpu", size=64, copy_mib=1)
    (device,) = figures["devices"]
    assert device["name"] == "host"
    assert min(device["tflops"], device["memory_gbps"], device["host_gbps"]) > 0
    assert figures["pairs_without_peer_access"] == []


@pytest.mark.integration
def test_all_reduce_over_two_processes():
    figures = measure_all_reduce(2, "gloo", size_mib=1)
    assert figures["version"] == "gloo"
    assert figures["bus_gbps"] > 0
