"""Fixtures of the logging tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from vz_ray.monitoring import logging_config


@pytest.fixture
def restored_loggers() -> Iterator[None]:
    """Restore the handlers of the package's and the engines' loggers after the test."""
    names = [logging_config.PACKAGE_LOGGER, *logging_config.ENGINE_LOGGERS]
    before = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).propagate) for name in names}
    yield
    logging.captureWarnings(False)
    for name, (handlers, propagate) in before.items():
        logging.getLogger(name).handlers[:] = handlers
        logging.getLogger(name).propagate = propagate
