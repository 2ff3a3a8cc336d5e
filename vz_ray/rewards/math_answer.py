"""Symbolic equality by math-verify, in a child process that can be killed.

A formula may be a tower of powers; evaluating it hangs inside one big-integer
operation, where no signal and no thread can stop it. The child is started on
first use, kept, and replaced after a hang or a crash.
"""

from __future__ import annotations

import atexit
import json
import re
import selectors
import subprocess
import sys
import threading
from typing import Any

from vz_ray.rewards.answer_text import normalize_text, strip_wrapping
from vz_ray.utils.errors import UserError
from vz_ray.utils.timeouts import StepTimeout

_LONGEST = 1000
_START_S = 120.0
"""How long the child may take to import math-verify, on a busy machine too."""
_TURN_S = 240.0
"""How long a formula may wait until those before it have been compared."""
_SIGNS = re.compile(r"[\\^*=√π+]")
_FUNCTIONS = r"(?:sin|cos|tan|log|ln|exp|pi)"
_BARE_FUNCTION = re.compile(rf"(?<![\\A-Za-z])({_FUNCTIONS})\b")
_BRACKETS = re.compile(r"\\[()\[\]]")
_WORDS = re.compile(rf"(?<![\\A-Za-z])(?!{_FUNCTIONS}\b)[A-Za-z]{{2,}}")


class UnparsableTruthError(ValueError):
    """The ground truth is no expression: no answer can be compared with it."""


def looks_like_formula(text: str) -> bool:
    """Whether `text`, without its introduction, has the signs of a formula and no words."""
    stripped = strip_wrapping(text)
    return len(stripped) <= _LONGEST and bool(_SIGNS.search(stripped)) and not _WORDS.search(stripped)


def to_latex(text: str) -> str:
    r"""`text` for math-verify: a bare formula is marked as LaTeX, else its last number would be read.

    Example: `The answer is 2x` gives `$2x$`; `we get $x$, thus $2x$` stays as it is.
    """
    stripped = _BRACKETS.sub("", strip_wrapping(text))
    if not stripped or _WORDS.search(stripped):
        return text
    return "$" + _BARE_FUNCTION.sub(r"\\\1", stripped) + "$"


class MathVerifyProcess:
    """One child; calls from several threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def compare(self, answer: str, truth: str, timeout_s: float) -> bool | None:
        """As `math_equal`, without its shortcuts."""
        if not self._lock.acquire(timeout=_TURN_S):
            raise StepTimeout("math-verify", "the formulas before this one", _TURN_S)
        try:
            self._start()
            said = self._exchange({"answer": to_latex(answer), "truth": to_latex(truth)}, timeout_s)
            if said is None:  # It hangs, or died of this formula.
                self._kill()
                return None
        finally:
            self._lock.release()
        if not said["truth"]:
            raise UnparsableTruthError(f"math-verify reads no expression in {truth[:80]!r}")
        return said["equal"] if said["answer"] else None

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        command = [sys.executable, "-m", "vz_ray.rewards.math_worker"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        ready = self._read(_START_S)
        if ready is None or ready["error"]:
            self._kill()
            why = ready["error"] if ready else f"it did not start within {_START_S:g} s"
            raise UserError(f"formulas cannot be compared, math-verify fails: {why}; install it again")

    def _exchange(self, request: dict[str, str], seconds: float) -> dict[str, Any] | None:
        """The child's reply; None if it gives none in time."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._read(seconds)

    def _read(self, seconds: float) -> dict[str, Any] | None:
        """The next line; None if it does not come in time."""
        assert self._process is not None
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(seconds) else ""
        return json.loads(line) if line else None

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def close(self) -> None:
        with self._lock:
            self._kill()


_CHILD = MathVerifyProcess()
atexit.register(_CHILD.close)


def math_equal(answer: str, truth: str, timeout_s: float = 20.0) -> bool | None:
    """Whether two spans state equal expressions; None if the answer cannot be read.

    Args:
        answer: Content of the answer span.
        truth: The ground truth.
        timeout_s: Limit, after which the answer counts as not readable.

    Raises:
        UnreadableTruth: The truth is no expression, and the answer not the same text.
        UserError: math-verify cannot be loaded.
        Overdue: Too many formulas that hang were before this one.
    """
    if normalize_text(answer) == normalize_text(truth):
        return True
    return None if len(answer) > _LONGEST else _CHILD.compare(answer, truth, timeout_s)
