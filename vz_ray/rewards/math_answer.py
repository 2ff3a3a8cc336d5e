"""Symbolic equality with math-verify, in a child process that can be killed.

Evaluating a tower of powers hangs inside one big-integer operation, which neither a signal nor a thread can
interrupt. The child starts on first use, is reused, and is replaced after a hang or a crash.
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

_MAX_CHARS = 1000
_START_TIMEOUT_S = 120.0
"""Timeout for the child's import of math-verify."""
_QUEUE_TIMEOUT_S = 240.0
"""Timeout for the comparisons queued before a formula."""
_MATH_SYMBOLS = re.compile(r"[\\^*=√π+]")
_FUNCTIONS = r"(?:sin|cos|tan|log|ln|exp|pi)"
_BARE_FUNCTION = re.compile(rf"(?<![\\A-Za-z])({_FUNCTIONS})\b")
_BRACKETS = re.compile(r"\\[()\[\]]")
_WORDS = re.compile(rf"(?<![\\A-Za-z])(?!{_FUNCTIONS}\b)[A-Za-z]{{2,}}")


class UnparsableTruthError(ValueError):
    """math-verify cannot parse the ground truth."""


def looks_like_formula(text: str) -> bool:
    """Return whether `text`, without its introduction, contains math symbols and no words."""
    stripped = strip_wrapping(text)
    return len(stripped) <= _MAX_CHARS and bool(_MATH_SYMBOLS.search(stripped)) and not _WORDS.search(stripped)


def to_latex(text: str) -> str:
    r"""Mark a bare formula as LaTeX: math-verify would otherwise parse its last number only.

    Example: `The answer is 2x` gives `$2x$`; `we get $x$, thus $2x$` stays unchanged.
    """
    stripped = _BRACKETS.sub("", strip_wrapping(text))
    if not stripped or _WORDS.search(stripped):
        return text
    return "$" + _BARE_FUNCTION.sub(r"\\\1", stripped) + "$"


class MathVerifyProcess:
    """Handle of the child process. Threads may share it; calls run one after another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def compare(self, answer: str, truth: str, timeout_s: float) -> bool | None:
        """Compare two expressions; None if the answer cannot be parsed or the child hangs.

        Raises the errors of `math_equal`.
        """
        if not self._lock.acquire(timeout=_QUEUE_TIMEOUT_S):
            raise StepTimeout("math-verify", "the queued comparisons", _QUEUE_TIMEOUT_S)
        try:
            self._start()
            reply = self._exchange({"answer": to_latex(answer), "truth": to_latex(truth)}, timeout_s)
            if reply is None:  # The child hangs or crashed.
                self._kill()
                return None
        finally:
            self._lock.release()
        if not reply["truth"]:
            raise UnparsableTruthError(f"math-verify cannot parse {truth[:80]!r}")
        return reply["equal"] if reply["answer"] else None

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        command = [sys.executable, "-m", "vz_ray.rewards.math_worker"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        ready = self._read(_START_TIMEOUT_S)
        if ready is None or ready["error"]:
            self._kill()
            reason = ready["error"] if ready else f"it did not start within {_START_TIMEOUT_S:g} s"
            raise UserError(f"math-verify failed: {reason}. Reinstall it to compare formulas.")

    def _exchange(self, request: dict[str, str], timeout_s: float) -> dict[str, Any] | None:
        """Send a request and return the reply; None after the timeout or a crash."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._read(timeout_s)

    def _read(self, timeout_s: float) -> dict[str, Any] | None:
        """Read the next line; None after the timeout."""
        assert self._process is not None
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(timeout_s) else ""
        return json.loads(line) if line else None

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def close(self) -> None:
        with self._lock:
            self._kill()


_PROCESS = MathVerifyProcess()
atexit.register(_PROCESS.close)


def math_equal(answer: str, truth: str, timeout_s: float = 20.0) -> bool | None:
    """Return whether two spans contain equal expressions; None if the answer cannot be parsed.

    Args:
        answer: Content of the answer span.
        truth: The ground truth.
        timeout_s: After this time the answer counts as not parsable.

    Raises:
        UnparsableTruthError: The truth cannot be parsed and the answer is not the same text.
        UserError: math-verify cannot be imported.
        StepTimeout: Hanging formulas blocked the queue for too long.
    """
    if normalize_text(answer) == normalize_text(truth):
        return True
    return None if len(answer) > _MAX_CHARS else _PROCESS.compare(answer, truth, timeout_s)
