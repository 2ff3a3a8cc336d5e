"""Data sheets of common GPUs, and the figures that `vz-ray doctor --gpu` measured."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vz_ray.planning.gpu_memory import GIB
from vz_ray.utils.errors import UserError

GPU_CHECK_FILE = "gpu-check.json"
"""File of measured figures, in the parent of the run directories."""


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """Data sheet of a GPU.

    Attributes:
        name: Words that all occur in the driver's product name.
        memory_gib: Memory that the driver reports.
        tflops: Dense bfloat16 peak.
        memory_gbps: Memory bandwidth in GB/s.
    """

    name: str
    memory_gib: float
    tflops: float
    memory_gbps: float

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)

    def matches(self, product: str) -> bool:
        """Return whether a product name such as `NVIDIA A100-SXM4-80GB` is this GPU."""
        return _words(self.name) <= _words(product)


H100 = GpuSpec("H100", 80, 989, 3350)
KNOWN_GPUS = (
    GpuSpec("B200", 179, 2250, 8000),
    GpuSpec("H200", 140, 989, 4800),
    H100,
    GpuSpec("A100-80GB", 80, 312, 2039),
    GpuSpec("A100-40GB", 40, 312, 1555),
    GpuSpec("L40S", 45, 362, 864),
    GpuSpec("L4", 22.5, 121, 300),
    GpuSpec("A10G", 22.5, 70, 600),
    GpuSpec("RTX-4090", 24, 165, 1008),
)


def find_gpu(name: str) -> GpuSpec | None:
    """Return the GPU with this name or product name. A name without its memory, such as `A100`, is the first match."""
    exact = next((spec for spec in KNOWN_GPUS if spec.matches(name)), None)
    return exact or next((spec for spec in KNOWN_GPUS if name and _words(name) <= _words(spec.name)), None)


def require_gpu(name: str) -> GpuSpec:
    """Return the GPU with this name.

    Raises:
        UserError: The name is unknown.
    """
    if (spec := find_gpu(name)) is None:
        names = ", ".join(spec.name for spec in KNOWN_GPUS)
        raise UserError(
            f"--gpu is {name!r}; known are {names}. For another GPU give --gpu-memory and --peak-tflops, or measure "
            "it with `vz-ray doctor --gpu`"
        )
    return spec


@dataclass(frozen=True, slots=True)
class GpuCheck:
    """Measured figures of the slowest GPU of a machine.

    Attributes:
        gpu: Product name.
        memory_bytes: Memory.
        tflops: Rate of a bfloat16 matrix product.
        memory_gbps: Copy within GPU memory, read and write, in GB/s.
        host_gbps: Copy from pinned host memory in GB/s.
        bus_gbps: Bandwidth of an all-reduce over all GPUs of the machine; 0 if not measured.
    """

    gpu: str
    memory_bytes: int
    tflops: float
    memory_gbps: float
    host_gbps: float
    bus_gbps: float


def read_gpu_check(file: Path) -> GpuCheck:
    """Read the figures that `vz-ray doctor --gpu` wrote.

    Raises:
        ValueError: The file has no usable figures; the message says why, without the file's name.
    """
    try:
        report = json.loads(file.read_text())
        gpus, devices = report["gpus"], report["figures"]["devices"]
        check = GpuCheck(
            gpu=str(devices[0]["name"]),
            memory_bytes=int(min(float(gpu["total_gib"]) for gpu in gpus) * GIB),
            tflops=_slowest(devices, "tflops"),
            memory_gbps=_slowest(devices, "memory_gbps"),
            host_gbps=_slowest(devices, "host_gbps"),
            bus_gbps=float(report["figures"].get("all_reduce", {}).get("bus_gbps", 0.0)),
        )
        split = [gpu["index"] for gpu in gpus if gpu["mig"]]
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror or error})") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"it has no valid figures of GPUs ({type(error).__name__}: {error})") from error
    if split:
        raise ValueError(f"GPU {split[0]} was split into MIG slices; give a slice's memory with --gpu-memory")
    if min(check.memory_bytes, check.tflops, check.memory_gbps, check.host_gbps) <= 0:
        raise ValueError("a figure is not above 0")
    return check


def _slowest(devices: list[dict[str, Any]], key: str) -> float:
    return min(float(device[key]) for device in devices)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))
