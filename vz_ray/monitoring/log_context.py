"""What a log line is about, and log lines as JSON objects, which collectors can filter by.

process    badge of the run, and who logs there (`rollout-3`): set once
task       iteration, episode or request at hand: a context variable, so that tasks do not mix them up
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What all processes of a run are given, to say whose they are.

    Attributes:
        run: Name of the run.
        log_format: `text` or `json`.
    """

    run: str = ""
    log_format: str = "text"


_about: ContextVar[dict[str, str | int] | None] = ContextVar("about", default=None)


@contextmanager
def log_context(**what: str | int) -> Iterator[None]:
    """Log records made inside are about these, and what they are about already.

    Example: `with about(step=3, episode="3/task-7/0#0"): ...`
    """
    token = _about.set({**(_about.get() or {}), **what})
    try:
        yield
    finally:
        _about.reset(token)


def set_log_context(**what: str | int) -> None:
    """Log records of this task are about these from now on: for a loop, whose turns need no block each.

    Example: `turn_to(step=4)`
    """
    _about.set({**(_about.get() or {}), **what})


def current_log_context() -> dict[str, str | int]:
    """What is at hand in this task."""
    return dict(_about.get() or {})


class JsonFormatter(logging.Formatter):
    """One object per record: `time`, `level`, `logger`, `message`, `run`, and what is known of the rest.

    Args:
        run: Name of the run; left out if empty.
        worker: Who logs in this process; left out if empty.
        rank: Its rank, where it is one of the learner's; left out otherwise.

    Example:
        {"time": "2026-01-05T10:00:00.123Z", "level": "WARNING", "logger": "vz_ray.rollout.worker_pool",
         "message": "rollout-3 is out of service: ...", "run": "agent", "worker": "rollout-3"}
    """

    def __init__(self, run: str = "", worker_name: str = "", rank: int | None = None) -> None:
        super().__init__()
        known = {"run": run, "worker": worker_name, "rank": rank}
        self._always = {name: value for name, value in known.items() if value not in ("", None)}

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, str | int | None] = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process or 0,
            **self._always,
            **current_log_context(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
