"""`vz-ray <command>`: reads arguments, calls one function, prints one-line errors.

Commands import what they need when they run, so that `vz-ray --help` is quick. It lists them in the
order in which their modules are imported here.
"""

# isort: off
from vz_ray.cli.app import app, main, resolve_config
from vz_ray.cli import train, plan, distill, eval, report, serve, submit, doctor  # noqa: F401
# isort: on

__all__ = ["app", "main", "resolve_config"]
