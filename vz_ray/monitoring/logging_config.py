"""Where log lines go: the project's own to the terminal, the engines' noise to files."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from logging.handlers import MemoryHandler
from pathlib import Path

from vz_ray.monitoring.log_context import JsonFormatter, RunIdentity

ENGINE_LOGGERS = (
    "vllm",
    "ray",
    "deepspeed",
    "DeepSpeed",
    "transformers",
    "asyncio",
    "opentelemetry",
    "py.warnings",
)
TEXT_FORMAT = "%(asctime)s %(levelname)s %(processName)s %(name)s: %(message)s"
PACKAGE_LOGGER = "vz_ray"
RAY_SERVE_LOGGER = "ray.serve"
"""Ray Serve's own logger, which has handlers in every process of its."""
QUIET_ENV = {
    "DS_ACCELERATOR_LOG_LEVEL": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_COLOR": "0",
}
"""Environment of the processes we start, so that files stay readable and bars stay out of them."""


def configure_logging(log_dir: Path, *, verbose: bool = False, identity: RunIdentity = RunIdentity()) -> None:  # noqa: B008 - frozen
    """Sends the project's log to `logs/vz_ray.log`, the engines' to `logs/engines.log`.

    Warnings of the project's own are shown on the terminal too (with `verbose`,
    everything of its own). Calling it again moves the files. With `identity.log_format`
    `json`, every line is an object, the terminal's too.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(_formatter("%(levelname)s: %(message)s", identity))
    terminal.setLevel(logging.DEBUG if verbose else logging.WARNING)
    _route(
        PACKAGE_LOGGER,
        [_file(log_dir / "vz_ray.log", identity), terminal],
        logging.DEBUG if verbose else logging.INFO,
    )
    engines = _file(log_dir / "engines.log", identity)
    for name in ENGINE_LOGGERS:
        _route(name, [engines], logging.INFO)
    logging.captureWarnings(True)
    for name, value in QUIET_ENV.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def redirected_output(path: Path) -> Iterator[None]:
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


def redirect_output(path: Path) -> None:
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


def configure_actor_logging(worker_name: str, identity: RunIdentity, rank: int | None = None) -> None:
    """What an actor logs goes to its standard error; as objects that name it, if `identity` asks for JSON.

    With text, Python's own way of writing warnings stays as it is.

    Args:
        rank: Of a rank of the learner.
    """
    if identity.log_format != "json":
        return
    for name in (PACKAGE_LOGGER, *ENGINE_LOGGERS):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter(identity.run, worker_name, rank))
        _route(name, [handler], logging.INFO)
    logging.captureWarnings(True)


def configure_replica_logging(worker_name: str, identity: RunIdentity) -> None:
    """What a replica of Ray Serve's logs goes where Ray Serve writes its own lines, to the replica's file.

    With JSON, all lines there are objects of our kind, Ray Serve's too, and those of engines are among them.
    """
    serve = logging.getLogger(RAY_SERVE_LOGGER)
    serve.handlers[:] = theirs = [_writer(handler) for handler in serve.handlers]
    _route(PACKAGE_LOGGER, theirs, logging.INFO)
    if identity.log_format != "json":
        return
    for handler in theirs:
        handler.setFormatter(JsonFormatter(identity.run, worker_name))
    for name in ENGINE_LOGGERS:
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


def _formatter(text: str, badge: RunIdentity) -> logging.Formatter:
    return JsonFormatter(badge.run) if badge.log_format == "json" else logging.Formatter(text)


def _file(path: Path, badge: RunIdentity) -> logging.Handler:
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(_formatter(TEXT_FORMAT, badge))
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
