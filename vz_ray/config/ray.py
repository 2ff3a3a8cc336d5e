"""Config of the Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.derived import timeout
from vz_ray.config.validation import InvalidValueError, check_choice, check_min

USE_GPUS = ("auto", "always", "never")


@dataclass
class RayConfig:
    """The Ray cluster of a run."""

    address: str = ""
    """Address of an existing cluster (`auto` finds one on this machine); empty starts a private cluster."""
    num_cpus: int = 8
    """Logical CPUs of a private cluster. They limit the number of actors and may exceed the physical
    cores."""
    object_store_mib: int = 512
    """Object store of a private cluster in MiB of shared memory."""
    metrics_port: int = 0
    """Port of a private cluster's Prometheus metrics; 0 chooses a free port, recorded in `scrape.json` of the
    run directory."""
    start_timeout_s: float = timeout("ray_start_s")
    """Timeout of starting or joining the cluster."""
    use_gpus: str = "auto"
    """GPUs for engines and learner: `always`, `never`, or `auto`: if the cluster has GPUs at the start of the
    run. Use `always` if GPU nodes are added on demand."""

    def __post_init__(self) -> None:
        check_choice(self, "use_gpus", USE_GPUS)
        check_min(self, 4, "num_cpus")
        check_min(self, 80, "object_store_mib")
        if not 0 <= self.metrics_port < 65536:
            raise InvalidValueError(
                "metrics_port",
                f"is {self.metrics_port}; it must be a port from 1 to 65535, or 0 for a free one",
            )
