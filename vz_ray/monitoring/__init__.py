"""Primitives that everyone may use and that know no one.

In: names, numbers, lines. Out: the run directory, metrics on disk, progress on
the terminal, log files, deadlines that name whom they waited for, clean stops,
errors that a person can mend. Must not know: any other room.
"""

from vz_ray.monitoring.run_dir import RunDir, write_atomic
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import Interrupt, StopRequested
from vz_ray.utils.timeouts import StepTimeout, with_timeout

__all__ = ["Interrupt", "StepTimeout", "RunDir", "StopRequested", "UserError", "with_timeout", "write_atomic"]
