"""Where log lines go: the project's own to the terminal, the engines' noise to files."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from logging.handlers import MemoryHandler
from pathlib import Path

from vz_ray.observe.records import Badge, JsonLines

ENGINES = ("vllm", "ray", "deepspeed", "DeepSpeed", "transformers", "asyncio", "opentelemetry", "py.warnings")
FORMAT = "%(asctime)s %(levelname)s %(processName)s %(name)s: %(message)s"
OWN = "vz_ray"
SERVE = "ray.serve"
"""Ray Serve's own logger, which has handlers in every process of its."""
QUIET = {
    "DS_ACCELERATOR_LOG_LEVEL": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_COLOR": "0",
}
"""Environment of the processes we start, so that files stay readable and bars stay out of them."""


def configure(logs: Path, *, verbose: bool = False, badge: Badge = Badge()) -> None:  # noqa: B008 - frozen
    """Sends the project's log to `logs/vz_ray.log`, the engines' to `logs/engines.log`.

    Warnings of the project's own are shown on the terminal too (with `verbose`,
    everything of its own). Calling it again moves the files. With `badge.log_format`
    `json`, every line is an object, the terminal's too.
    """
    logs.mkdir(parents=True, exist_ok=True)
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(_formatter("%(levelname)s: %(message)s", badge))
    terminal.setLevel(logging.DEBUG if verbose else logging.WARNING)
    _route(OWN, [_file(logs / "vz_ray.log", badge), terminal], logging.DEBUG if verbose else logging.INFO)
    engines = _file(logs / "engines.log", badge)
    for name in ENGINES:
        _route(name, [engines], logging.INFO)
    logging.captureWarnings(True)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Sends everything this process prints to `path` meanwhile, C code's output included.

    Args:
        path: Appended to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    try:
        _point_output_at(path)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, target in zip(saved, (1, 2), strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)


def keep_output_in(path: Path) -> None:
    """Sends everything this process prints to `path` from now on; for actors and child processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    _point_output_at(path)


def _point_output_at(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def in_actor(worker: str, badge: Badge, rank: int | None = None) -> None:
    """What an actor logs goes to its standard error; as objects that name it, if `badge` asks for JSON.

    With text, Python's own way of writing warnings stays as it is.

    Args:
        rank: Of a rank of the learner.
    """
    if badge.log_format != "json":
        return
    for name in (OWN, *ENGINES):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines(badge.run, worker, rank))
        _route(name, [handler], logging.INFO)
    logging.captureWarnings(True)


def in_replica(worker: str, badge: Badge) -> None:
    """What a replica of Ray Serve's logs goes where Ray Serve writes its own lines, to the replica's file.

    With JSON, all lines there are objects of our kind, Ray Serve's too, and those of engines are among them.
    """
    serve = logging.getLogger(SERVE)
    serve.handlers[:] = theirs = [_writer(handler) for handler in serve.handlers]
    _route(OWN, theirs, logging.INFO)
    if badge.log_format != "json":
        return
    for handler in theirs:
        handler.setFormatter(JsonLines(badge.run, worker))
    for name in ENGINES:
        if name != "ray":  # Ray Serve's logger lies below it
            _route(name, theirs, logging.INFO)
    logging.captureWarnings(True)


def _writer(handler: logging.Handler) -> logging.Handler:
    """The handler that writes what `handler` may keep back for it.

    vLLM closes every handler of the process as it is imported. One of a file opens it again with the next
    line; one that keeps lines back never writes again.
    """
    if not isinstance(handler, MemoryHandler) or handler.target is None:
        return handler
    for filter in handler.filters:
        handler.target.addFilter(filter)
    return handler.target


def _formatter(text: str, badge: Badge) -> logging.Formatter:
    return JsonLines(badge.run) if badge.log_format == "json" else logging.Formatter(text)


def _file(path: Path, badge: Badge) -> logging.Handler:
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(_formatter(FORMAT, badge))
    return handler


def _route(name: str, handlers: list[logging.Handler], level: int) -> None:
    logger = logging.getLogger(name)
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
