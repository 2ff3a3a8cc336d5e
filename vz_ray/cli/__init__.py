"""The `vz-ray` command line: one function per command, which parses arguments, calls one function, prints.

Each module holds the commands of one section of the help, in the order that the help lists them. Commands
import what they need when they run, so that `vz-ray --help` is fast.
"""

# isort: off
from vz_ray.cli.app import app, main, resolve_config
from vz_ray.cli import training, evaluation, inspection, serving, cluster, k8s, machine  # noqa: F401
# isort: on

__all__ = ["app", "main", "resolve_config"]
