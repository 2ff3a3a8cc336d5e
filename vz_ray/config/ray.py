"""Config of the Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.fields import Section, choice, number
from vz_ray.config.timeouts import timeout


@dataclass
class RayConfig(Section):
    """The Ray cluster of a run."""

    address: str = ""
    """Address of an existing cluster (`auto` finds one on this machine); empty starts a private cluster."""
    num_cpus: int = number(8, minimum=4)
    """Logical CPUs of a private cluster. They limit the number of actors and may exceed the physical
    cores."""
    object_store_mib: int = number(512, minimum=80)
    """Object store of a private cluster in MiB of shared memory."""
    metrics_port: int = number(0, minimum=0, maximum=65535, reason="; 0 chooses a free port")
    """Port of a private cluster's Prometheus metrics; 0 chooses a free port, recorded in
    `prometheus_targets.json` of the run directory."""
    start_timeout_s: float = timeout("ray_start_s")
    """Timeout of starting or joining the cluster."""
    use_gpus: str = choice("auto", "always", "never")
    """GPUs for engines and learner: `always`, `never`, or `auto`: if the cluster has GPUs at the start of the
    run. Use `always` if GPU nodes are added on demand."""
