"""The `vz-ray` command line: one module per command, which parses arguments, calls one function, prints.

Commands import what they need when they run, so that `vz-ray --help` is fast. The help lists commands in the
order of the imports below.
"""

# isort: off
from vz_ray.cli.app import app, main, resolve_config
from vz_ray.cli import synth, base, train, sft, export, quickstart, baseline, ablate, plan, distill  # noqa: F401
from vz_ray.cli import eval, check_reward, calibrate_gate  # noqa: F401
from vz_ray.cli import report, view, top, compare, replay  # noqa: F401
from vz_ray.cli import serve, roll, ask, keys  # noqa: F401
from vz_ray.cli import submit, preflight, drain  # noqa: F401
from vz_ray.cli import doctor, clip  # noqa: F401
# isort: on

__all__ = ["app", "main", "resolve_config"]
