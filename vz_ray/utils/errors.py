"""Errors that the user can fix. The command line shows them as one line."""

from __future__ import annotations


class UserError(Exception):
    """A problem outside the program. The message names the problem and the fix.

    The command line prints the message and exits with status 2; `VZ_RAY_DEBUG=1` shows the traceback.

    Example: `UserError("no video at videos/a.mp4: run `vz-ray synth` first")`
    """
