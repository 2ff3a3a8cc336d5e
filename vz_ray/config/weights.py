"""Config of weight publishes from the learner to the engines."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.fields import Section, choice, number
from vz_ray.config.timeouts import timeout


@dataclass
class WeightsConfig(Section):
    """Transport and verification of weight publishes."""

    transport: str = choice("shm", "nccl", "ipc")
    """`shm`: shared memory of each node, on CPU or GPU; `nccl`: broadcast between GPUs; `ipc`: learner and
    engine share one GPU, half each."""
    keep_shm_copy: bool = True
    """With `nccl` and `ipc`, also keep the newest version in shared memory. Workers that start between
    publishes, or on spot nodes, load it from there."""
    shm_dir: str | None = None
    """Directory of versions in shared memory; default: a directory of the run in /dev/shm."""
    bucket_mib: int = number(256, minimum=1)
    """Maximum size of one file, or of one gather of a sharded model, in MiB."""
    probe_every: int = number(1, minimum=1)
    """Publishes between parity probes, which compare log-probs of engine and learner on a fixed prompt. The first
    publish is always probed."""
    probe_tolerance: float | None = number(None, above=0)
    """Maximum mean log-prob gap of the parity probe. Default: 1e-4 in float32, 0.05 in float16, 0.15 in bfloat16. The
    first publish lowers it to five times its own gap, but not below 1e-4, 0.005 and 0.03."""
    timeout_s: float = timeout("publish_s")
    """Timeout of each phase of a publish, per worker."""
