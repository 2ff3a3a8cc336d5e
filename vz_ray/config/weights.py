"""Config of how new weights reach the engines."""

from __future__ import annotations

from dataclasses import dataclass

TRANSPORTS = ("shm", "nccl", "ipc")


@dataclass
class WeightsConfig:
    """How weights are published.

    Attributes:
        transport: `shm`: through shared memory of each node, on CPU or GPU; `nccl`: broadcast
            between GPUs; `ipc`: learner and engine on one GPU, which each gets half of.
        keep_shm_copy: With `nccl` and `ipc`, keep the newest version in shared memory, too: workers that join
            between publishes or run on spot nodes pull it from there, and no group waits for them.
        shm_dir: Where versions in shared memory lie; null is a directory of this run in /dev/shm.
        bucket_mib: Most MiB in one file, or in one gathering of a sharded model.
        probe_every: Compare engine and learner on a fixed prompt at every n-th publish.
        probe_tolerance: Largest difference in log-prob there (1e-4 in float32; about 0.1 in bfloat16).
        timeout_s: Seconds in which each step of a publish must be done by each worker.
    """

    transport: str = "shm"
    keep_shm_copy: bool = True
    shm_dir: str | None = None
    bucket_mib: int = 256
    probe_every: int = 1
    probe_tolerance: float = 1e-4
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if self.transport not in TRANSPORTS:
            raise ValueError(
                f"weights.transport is {self.transport!r}; it must be one of {', '.join(TRANSPORTS)}"
            )
        for name in ("bucket_mib", "probe_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"weights.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("probe_tolerance", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"weights.{name} is {getattr(self, name)}; it must be above 0")
