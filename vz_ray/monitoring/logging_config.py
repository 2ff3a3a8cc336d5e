"""Log destinations: records of vz_ray go to the terminal and a file, records of engines to another file."""

from __future__ import annotations

import logging
import os
import sys
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
"""Logger of Ray Serve. It has handlers in each of its processes."""
QUIET_ENV = {
    "DS_ACCELERATOR_LOG_LEVEL": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_COLOR": "0",
}
"""Environment defaults for child processes: no progress bars or colors in log files."""


def configure_logging(
    log_dir: Path,
    *,
    verbose: bool = False,
    identity: RunIdentity = RunIdentity(),  # noqa: B008 - frozen
) -> None:
    """Write records of vz_ray to `vz_ray.log` and records of engines to `engines.log` in `log_dir`.

    Warnings of vz_ray also go to the terminal; with `verbose`, all its records. A second call replaces the
    files. If `identity.log_format` is `json`, every line is a JSON object, also on the terminal.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(_make_formatter("%(levelname)s: %(message)s", identity))
    terminal.setLevel(logging.DEBUG if verbose else logging.WARNING)
    level = logging.DEBUG if verbose else logging.INFO
    _set_handlers(PACKAGE_LOGGER, [_file_handler(log_dir / "vz_ray.log", identity), terminal], level)
    engines = _file_handler(log_dir / "engines.log", identity)
    for name in ENGINE_LOGGERS:
        _set_handlers(name, [engines], logging.INFO)
    logging.captureWarnings(True)
    for name, value in QUIET_ENV.items():
        os.environ.setdefault(name, value)


def redirect_output(path: Path) -> None:
    """Append stdout and stderr of this process, its children and C code to `path` from now on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def configure_actor_logging(worker_name: str, identity: RunIdentity, rank: int | None = None) -> None:
    """Write the records of a Ray actor to stderr as JSON objects if `identity` selects JSON.

    With text, the default of Python's `logging` applies.

    Args:
        rank: Rank of a learner actor.
    """
    if identity.log_format != "json":
        return
    for name in (PACKAGE_LOGGER, *ENGINE_LOGGERS):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter(identity.run, worker_name, rank))
        _set_handlers(name, [handler], logging.INFO)
    logging.captureWarnings(True)


def configure_replica_logging(worker_name: str, identity: RunIdentity) -> None:
    """Write the records of a Ray Serve replica to the replica's log file.

    With JSON, all lines of the file use `JsonFormatter`, including lines of Ray Serve and of engines.
    """
    serve = logging.getLogger(RAY_SERVE_LOGGER)
    serve.handlers[:] = handlers = [_unbuffered(handler) for handler in serve.handlers]
    _set_handlers(PACKAGE_LOGGER, handlers, logging.INFO)
    if identity.log_format != "json":
        return
    for handler in handlers:
        handler.setFormatter(JsonFormatter(identity.run, worker_name))
    for name in ENGINE_LOGGERS:
        if name != "ray":  # the parent of Ray Serve's logger
            _set_handlers(name, handlers, logging.INFO)
    logging.captureWarnings(True)


def _unbuffered(handler: logging.Handler) -> logging.Handler:
    """Return the target of a memory handler, or the handler itself.

    The import of vLLM closes all handlers of the process. A closed file handler reopens its file on the next
    record; a closed memory handler never writes again.
    """
    if not isinstance(handler, MemoryHandler) or handler.target is None:
        return handler
    for filter in handler.filters:
        handler.target.addFilter(filter)
    return handler.target


def _make_formatter(text_format: str, identity: RunIdentity) -> logging.Formatter:
    return JsonFormatter(identity.run) if identity.log_format == "json" else logging.Formatter(text_format)


def _file_handler(path: Path, identity: RunIdentity) -> logging.Handler:
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(_make_formatter(TEXT_FORMAT, identity))
    return handler


def _set_handlers(name: str, handlers: list[logging.Handler], level: int) -> None:
    """Replace the handlers of a logger and close the old ones."""
    logger = logging.getLogger(name)
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
