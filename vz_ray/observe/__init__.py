"""Primitives that everyone may use and that know no one.

In: names, numbers, lines. Out: the run directory, metrics on disk, progress on
the terminal, log files, deadlines that name whom they waited for, clean stops,
errors that a person can mend. Must not know: any other room.
"""

from vz_ray.observe.deadline import Overdue, within
from vz_ray.observe.errors import UserError
from vz_ray.observe.interrupt import Interrupt, StopRequested
from vz_ray.observe.run_dir import RunDir, write_atomic

__all__ = ["Interrupt", "Overdue", "RunDir", "StopRequested", "UserError", "within", "write_atomic"]
