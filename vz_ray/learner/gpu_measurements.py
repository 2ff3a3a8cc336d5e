"""Short measurements on GPUs, run as a child process: `python -m vz_ray.learner.gpu_measurements devices`.

Prints one JSON object as its last line. With the device `cpu`, the same code runs on the host.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

MIB = 1 << 20
REPEATS = 5


def main(arguments: list[str]) -> None:
    match arguments:
        case ["build"]:
            figures: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda}
        case ["devices"]:
            figures = measure_devices()
        case ["all_reduce", world_size]:
            figures = measure_all_reduce(int(world_size))
        case _:
            sys.exit("usage: gpu_measurements build | devices | all_reduce WORLD_SIZE")
    print(json.dumps(figures))


def measure_devices(device_type: str = "cuda", *, size: int = 8192, copy_mib: int = 512) -> dict[str, Any]:
    """Measure each GPU: bfloat16 matrix products, copies within its memory, and copies from pinned host memory.

    Args:
        device_type: `cuda`, or `cpu` for one host device.
        size: Side of the square matrices.
        copy_mib: Size of the copied buffer.

    Returns:
        `devices`, a list with name, capability, TFLOP/s and GB/s of each; `pairs_without_peer_access`.
    """
    count = torch.cuda.device_count() if device_type == "cuda" else 1
    devices = [_measure_device(device_type, index, size, copy_mib) for index in range(count)]
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    blocked = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    return {"devices": devices, "pairs_without_peer_access": blocked}


def _measure_device(device_type: str, index: int, size: int, copy_mib: int) -> dict[str, Any]:
    on_gpu = device_type == "cuda"
    device = torch.device(device_type, index)
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    buffer = torch.zeros(copy_mib * MIB, device=device, dtype=torch.uint8)
    target, host = torch.empty_like(buffer), torch.zeros(copy_mib * MIB, dtype=torch.uint8, pin_memory=on_gpu)
    product_s = _fastest(lambda: matrix @ matrix, device)
    copy_s = _fastest(lambda: target.copy_(buffer), device)
    host_s = _fastest(lambda: target.copy_(host, non_blocking=True), device)
    if not torch.isfinite(matrix @ matrix).all():
        raise RuntimeError(f"a matrix product on {device} is not finite: the GPU may be faulty")
    return {
        "index": index,
        "name": torch.cuda.get_device_name(device) if on_gpu else "host",
        "capability": list(torch.cuda.get_device_capability(device)) if on_gpu else [0, 0],
        "tflops": 2 * size**3 / product_s / 1e12,
        "memory_gbps": 2 * buffer.numel() / copy_s / 1e9,
        "host_gbps": buffer.numel() / host_s / 1e9,
    }


def _fastest(operation: Callable[[], object], device: torch.device) -> float:
    """Return the shortest duration of an operation in seconds, after one warm-up."""
    durations = []
    for _ in range(REPEATS + 1):
        _synchronize(device)
        start = time.perf_counter()
        operation()
        _synchronize(device)
        durations.append(time.perf_counter() - start)
    return min(durations[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_all_reduce(world_size: int, backend: str = "nccl", *, size_mib: int = 256) -> dict[str, Any]:
    """Measure an all-reduce over `world_size` processes, one per GPU.

    Returns:
        `version` of the backend; `bus_gbps`, the bandwidth of each link in NCCL's definition.

    Raises:
        torch.multiprocessing.ProcessRaisedException: A process failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    arguments = (world_size, port, backend, size_mib, results)
    torch.multiprocessing.spawn(_all_reduce, args=arguments, nprocs=world_size, join=True)
    seconds = results.get()
    version = ".".join(map(str, torch.cuda.nccl.version())) if backend == "nccl" else backend
    bus_bytes = 2 * (world_size - 1) / world_size * size_mib * MIB
    return {"version": version, "bus_gbps": bus_bytes / seconds / 1e9}


def _all_reduce(rank: int, world_size: int, port: int, backend: str, size_mib: int, results: Any) -> None:
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(backend, rank=rank, world_size=world_size)
    buffer = torch.ones(size_mib * MIB // 2, device=device, dtype=torch.bfloat16)
    seconds = _fastest(lambda: dist.all_reduce(buffer), device)
    if rank == 0:
        results.put(seconds)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
