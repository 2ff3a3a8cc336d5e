"""Context fields of log records, and JSON log lines.

process    run identity and worker name, set once per process
task       step, episode or request, in a context variable, so concurrent tasks stay separate
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
    """Run name and log format, passed to every process of a run.

    Attributes:
        run: Name of the run.
        log_format: `text` or `json`.
    """

    run: str = ""
    log_format: str = "text"


_context: ContextVar[dict[str, str | int] | None] = ContextVar("log_context", default=None)


@contextmanager
def log_context(**fields: str | int) -> Iterator[None]:
    """Add `fields` to the log records of this task inside the block.

    Example: `with log_context(step=3, episode="3/task-7/0#0"): ...`
    """
    token = _context.set({**(_context.get() or {}), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def set_log_context(**fields: str | int) -> None:
    """Add `fields` to the log records of this task from now on.

    Example: `set_log_context(step=4)`
    """
    _context.set({**(_context.get() or {}), **fields})


def current_log_context() -> dict[str, str | int]:
    """Return the context fields of this task."""
    return dict(_context.get() or {})


class JsonFormatter(logging.Formatter):
    """Formats each record as a JSON object with `time`, `level`, `logger`, `message`, `run` and the context.

    Args:
        run: Name of the run; omitted if empty.
        worker_name: Name of this process; omitted if empty.
        rank: Rank of a learner process; omitted otherwise.

    Example:
        {"time": "2026-01-05T10:00:00.123Z", "level": "WARNING", "logger": "vz_ray.rollout.worker_pool",
         "message": "Draining worker rollout-3: ...", "run": "agent", "worker": "rollout-3"}
    """

    def __init__(self, run: str = "", worker_name: str = "", rank: int | None = None) -> None:
        super().__init__()
        fields = {"run": run, "worker": worker_name, "rank": rank}
        self._process_fields = {name: value for name, value in fields.items() if value not in ("", None)}

    def format(self, record: logging.LogRecord) -> str:
        timestamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, str | int | None] = {
            "time": f"{timestamp}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process or 0,
            **self._process_fields,
            **current_log_context(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
