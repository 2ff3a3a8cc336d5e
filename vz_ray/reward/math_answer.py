"""Symbolic equality by math-verify, in a child process that can be killed.

A formula may be a tower of powers; evaluating it hangs inside one big-integer
operation, where no signal and no thread can stop it. The child is started on
first use, kept, and replaced after a hang.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import selectors
import subprocess
import sys
import threading

from vz_ray.reward.span import folded

_LONGEST = 1000


class MathChild:
    """One child; calls from several threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "vz_ray.reward.math_child"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        return self._process

    def ask(self, answer: str, truth: str, seconds: float) -> bool | None:
        """As `math_equal`, without its shortcuts."""
        with self._lock:
            child = self._started()
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(json.dumps({"answer": answer, "truth": truth}) + "\n")
            child.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(child.stdout, selectors.EVENT_READ)
                line = child.stdout.readline() if selector.select(seconds) else ""
            if not line:  # It hangs, or died of this formula.
                self._kill()
                return None
            verdict = json.loads(line)
            return None if verdict is None else bool(verdict)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def close(self) -> None:
        with self._lock:
            self._kill()


_CHILD = MathChild()
atexit.register(_CHILD.close)


def math_equal(answer: str, truth: str, seconds: float = 20.0) -> bool | None:
    """Whether two spans state equal expressions; None if the answer cannot be read.

    Args:
        answer: Content of the answer span.
        truth: The ground truth.
        seconds: Limit, after which the answer counts as not readable.

    Raises:
        RuntimeError: math-verify is not installed.
    """
    if folded(answer) == folded(truth):
        return True
    if len(answer) > _LONGEST:
        return None
    if importlib.util.find_spec("math_verify") is None:
        raise RuntimeError(f"the ground truth {truth!r} is a formula: `pip install math-verify` to score it")
    return _CHILD.ask(answer, truth, seconds)
