"""Errors that the user can fix. The command line shows them as one line."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """A problem outside the program. The message names the problem and the fix.

    The command line prints the message and exits with status 2; `VZ_RAY_DEBUG=1` shows the traceback.

    Example: `UserError("no video at videos/a.mp4: run `vz-ray synth` first")`
    """


def join_first(items: Sequence[str], maximum: int, separator: str = "; ") -> str:
    """Join the first `maximum` items of a message and the number of the others.

    Example: `join_first(["a", "b", "c"], 2)` is `a; b; and 1 more`
    """
    omitted = len(items) - maximum
    return separator.join([*items[:maximum], *([f"and {omitted} more"] if omitted > 0 else [])])
