"""Restart the learner after a lost rank and resume training from the newest checkpoint.

    train --rank lost--> restart the learner --> train, from the newest checkpoint or from the initial model

Engines, decoders and the driver keep running. The run stops after too many consecutive failures without
a new training step, because the cause would persist.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from vz_ray.learner.learner import Learner, LearnerDiedError
from vz_ray.monitoring.metric_logger import read_metrics
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import Interrupt
from vz_ray.weight_sync.weight_store import WeightIntegrityError

T = TypeVar("T")

log = logging.getLogger(__name__)


class RestartPolicy:
    """Count of consecutive learner failures.

    Args:
        max_restarts: Maximum consecutive failures.

    Attributes:
        consecutive_failures: Failures since the last new training step.
    """

    def __init__(self, max_restarts: int) -> None:
        self._max_restarts = max_restarts
        self._last_step = -1.0
        self.consecutive_failures = 0

    def record_failure(self, failure: Exception, step: float) -> None:
        """Record a failure; `step` is the last completed training step, or -1.

        Raises:
            UserError: The number of consecutive failures exceeds the maximum.
        """
        if step > self._last_step:
            self._last_step, self.consecutive_failures = step, 0
        self.consecutive_failures += 1
        if self.consecutive_failures > self._max_restarts:
            raise UserError(
                f"{failure}; {self.consecutive_failures} consecutive learner failures without a new step exceed "
                f"learner.max_restarts ({self._max_restarts}). If the process ran out of memory, lower "
                "learner.micro_batch_tokens or raise learner.world_size. The same command resumes from the newest "
                "checkpoint."
            ) from failure


async def run_with_restarts(
    learner: Learner,
    train: Callable[[], Awaitable[T]],
    *,
    before_restart: Callable[[], Coroutine[Any, Any, None]] | None = None,
    max_restarts: int,
    metrics: Path,
    interrupt: Interrupt,
) -> T:
    """Await `train()`; after a lost rank, restart the learner and await it again.

    Args:
        train: Trains from its newest checkpoint, or from the initial model.
        before_restart: Frees the resources that a starting learner needs.
        max_restarts: See `RestartPolicy`.
        metrics: Metrics file of `train`; its last step is the progress.

    Raises:
        UserError: Too many consecutive failures.
        StopRequested: A stop was requested during a restart.
    """
    policy = RestartPolicy(max_restarts)
    while True:
        try:
            if policy.consecutive_failures:
                if before_restart is not None:
                    await interrupt.run_interruptible(before_restart())
                await interrupt.run_interruptible(learner.restart())
            return await train()
        except (LearnerDiedError, WeightIntegrityError) as error:
            failure = error if isinstance(error, LearnerDiedError) else error.__cause__
            if not isinstance(failure, LearnerDiedError):
                raise
            policy.record_failure(failure, _last_step(metrics))
            log.warning("Restarting the learner from its newest checkpoint: %s", failure)


def _last_step(metrics: Path) -> float:
    return max((row["step"] for row in read_metrics(metrics)), default=-1.0)
