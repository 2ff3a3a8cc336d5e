"""Inputs of a plan that the config does not contain: GPUs, their speed, and typical episodes.

Speeds are data sheet values times assumed fractions. If `vz-ray doctor --gpu` measured the GPU, its figures take
their place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from vz_ray.planning.gpu_figures import H100, GpuCheck, GpuSpec, find_gpu, read_gpu_check, require_gpu
from vz_ray.planning.gpu_memory import GIB, parse_bytes
from vz_ray.utils.errors import UserError

MATMUL_SHARE = 0.7
"""Assumed fraction of the peak of a large matrix product; relates a measured product to the assumed fractions."""
COPY_SHARE = 0.85
"""The same for a copy within GPU memory and the memory bandwidth."""
SAME_MEMORY = 0.1
"""Relative difference up to which two amounts of GPU memory are the same GPU."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Inputs of a plan that the config does not contain.

    Attributes:
        gpu_bytes: Memory of each GPU.
        peak_tflops: Peak of each GPU in the learner's dtype.
        mfu: Fraction of the peak that the learner reaches.
        zooms: Zooms of a typical episode; the paper's average is two.
        turn_tokens: Sampled tokens of a typical turn.
        gpu: Name of the GPU.
        memory_gbps: Bandwidth of a GPU's memory in GB/s.
        decode_share: Fraction of that bandwidth that sampling reaches.
        prefill_mfu: Fraction of the peak that prefill reaches.
        host_gbps: Copies between host and GPU memory in GB/s, per GPU.
        node_gbps: NCCL between the GPUs of a node in GB/s, per GPU.
        network_gbps: NCCL between nodes in GB/s, per GPU.
        shm_gbps: Writing hashed weights from GPUs to shared memory in GB/s.
        storage_gbps: Reading or writing checkpoints in GB/s.
        measured: Names of the fields that were measured.
        measured_in: File of the measurement; empty if nothing was measured.
    """

    gpu_bytes: int = H100.memory_bytes
    peak_tflops: float = H100.tflops
    mfu: float = 0.35
    zooms: int = 2
    turn_tokens: int = 170
    gpu: str = H100.name
    memory_gbps: float = H100.memory_gbps
    decode_share: float = 0.6
    prefill_mfu: float = 0.4
    host_gbps: float = 25.0
    node_gbps: float = 200.0
    network_gbps: float = 40.0
    shm_gbps: float = 0.8
    storage_gbps: float = 0.2
    measured: tuple[str, ...] = ()
    measured_in: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu is {self.mfu}; it must be above 0 and at most 1")
        if self.peak_tflops <= 0:
            raise UserError(f"--peak-tflops is {self.peak_tflops}; it must be above 0")
        for option, value, minimum in (("--zooms", self.zooms, 0), ("--turn-tokens", self.turn_tokens, 1)):
            if value < minimum:
                raise UserError(f"{option} is {value}; it must be at least {minimum}")

    def with_gpu(self, spec: GpuSpec) -> Assumptions:
        """Return the assumptions for another GPU."""
        return replace(
            self, gpu=spec.name, gpu_bytes=spec.memory_bytes, peak_tflops=spec.tflops, memory_gbps=spec.memory_gbps
        )

    def with_check(self, check: GpuCheck, file: Path) -> Assumptions:
        """Replace assumptions by measured figures. The data sheet follows from the figures if the GPU is unknown."""
        spec = find_gpu(check.gpu) or GpuSpec(
            check.gpu, check.memory_bytes / GIB, check.tflops / MATMUL_SHARE, check.memory_gbps / COPY_SHARE
        )
        compute = check.tflops / (MATMUL_SHARE * spec.tflops)
        memory = check.memory_gbps / (COPY_SHARE * spec.memory_gbps)
        changes = {
            "gpu_bytes": check.memory_bytes,
            "mfu": min(1.0, self.mfu * compute),
            "prefill_mfu": min(1.0, self.prefill_mfu * compute),
            "decode_share": min(1.0, self.decode_share * memory),
            "host_gbps": check.host_gbps,
            **({"node_gbps": check.bus_gbps} if check.bus_gbps else {}),
        }
        return replace(
            self.with_gpu(spec),
            gpu=check.gpu,
            **changes,  # type: ignore[arg-type]
            measured=tuple(changes),
            measured_in=str(file),
        )


def load_assumptions(
    check_file: Path, *, gpu: str = "", gpu_memory: str = "", peak_tflops: float = 0.0, mfu: float = 0.0
) -> tuple[Assumptions, list[str]]:
    """Return the assumptions and one-line warnings.

    Options win over measured figures, which win over the data sheet of `gpu`.

    Args:
        check_file: Figures of `vz-ray doctor --gpu`; it may be missing.
        gpu: Name of the GPU; default: the measured one, else an H100.
        gpu_memory: Memory of a GPU, such as `80GiB`; default: that of the GPU.
        peak_tflops: Peak of a GPU; default 0: that of the GPU.
        mfu: MFU of the learner; default 0: measured or assumed.

    Raises:
        UserError: An option is invalid.
    """
    spec = require_gpu(gpu) if gpu else None
    assumptions, warnings = Assumptions(), []
    if spec is not None:
        assumptions = assumptions.with_gpu(spec)
    if gpu_memory:
        assumptions = replace(assumptions, gpu_bytes=parse_bytes(gpu_memory))
    if check_file.exists():
        try:
            check = read_gpu_check(check_file)
            _check_same_gpu(check, spec, assumptions.gpu_bytes if gpu_memory else 0)
        except ValueError as error:
            warnings.append(f"{check_file} is ignored: {error}. `vz-ray doctor --gpu` writes a new one.")
        else:
            assumptions = assumptions.with_check(check, check_file)
    options = {"gpu_bytes": parse_bytes(gpu_memory) if gpu_memory else 0, "peak_tflops": peak_tflops, "mfu": mfu}
    options = {name: value for name, value in options.items() if value}
    measured = tuple(name for name in assumptions.measured if name not in options)
    return replace(assumptions, **options, measured=measured), warnings  # type: ignore[arg-type]


def _check_same_gpu(check: GpuCheck, spec: GpuSpec | None, gpu_bytes: int) -> None:
    """Raise `ValueError` if the measured GPU is not the planned one."""
    if spec is not None and not spec.matches(check.gpu):
        raise ValueError(f"it measured {check.gpu}, the plan is for {spec.name}")
    if gpu_bytes and abs(check.memory_bytes - gpu_bytes) > SAME_MEMORY * gpu_bytes:
        measured, planned = check.memory_bytes / GIB, gpu_bytes / GIB
        raise ValueError(f"it measured {check.gpu} with {measured:.0f} GiB, the plan is for {planned:.0f} GiB")
