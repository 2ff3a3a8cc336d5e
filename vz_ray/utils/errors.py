"""Errors that a person can mend: shown as one line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something outside the program is wrong; the message names it and the fix.

    The command line prints it as one line and exits with status 2;
    `VZ_RAY_DEBUG=1` shows the traceback.

    Example: `UserError("no video at videos/a.mp4: run `vz-ray synth` first")`
    """
