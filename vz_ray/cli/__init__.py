"""`vz-ray <command>`: reads arguments, calls one function, prints one-line errors.

Commands import what they need when they run, so that `vz-ray --help` is quick. It lists them in the
order in which their modules are imported here.
"""

# isort: off
from vz_ray.cli.app import app, main, settings
from vz_ray.cli import training, planning, distilling, evaluating, looking, serving, cluster, machine  # noqa: F401
# isort: on

__all__ = ["app", "main", "settings"]
