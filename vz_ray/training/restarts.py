"""A learner that dies does not end the run: it is started again, and training goes on from its checkpoint.

    work --a rank died--> restart the learner --> work, which goes on from its newest checkpoint
                                                  (or from the beginning, where there is none)

Engines, decoders and this process live on. A row of losses in which training comes no further ends
the run: whatever kills the learner would kill it again.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from vz_ray.learner.learner import Learner, LearnerDiedError
from vz_ray.monitoring.metric_logger import read_metrics
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import Interrupt
from vz_ray.weight_sync.weight_store import WeightIntegrityError

T = TypeVar("T")

log = logging.getLogger(__name__)


class RestartPolicy:
    """Counts the losses of a learner in a row. Pure.

    Args:
        most: Longest row that is put up with.

    Attributes:
        consecutive_failures: Losses since training last came further than it had ever been.
    """

    def __init__(self, max_restarts: int) -> None:
        self._most, self._furthest, self.consecutive_failures = max_restarts, -1.0, 0

    def record_failure(self, failure: Exception, step: float) -> None:
        """One more; `step` is the last whole one that is done, -1 if none is.

        Raises:
            UserError: It is one too many.
        """
        if step > self._furthest:
            self._furthest, self.consecutive_failures = step, 0
        self.consecutive_failures += 1
        if self.consecutive_failures > self._most:
            raise UserError(
                f"{failure}; that is loss {self.consecutive_failures} of the learner in a row without a step that had not been "
                f"done before, above learner.max_restarts ({self._most}): find out what ends the process (memory "
                "is the usual reason; then lower learner.micro_batch_tokens or add ranks); the same command "
                "resumes from the last checkpoint"
            ) from failure


async def run_with_restarts(
    learner: Learner,
    train: Callable[[], Awaitable[T]],
    *,
    max_restarts: int,
    metrics: Path,
    interrupt: Interrupt,
) -> T:
    """Awaits `train()`, again for each time that the learner is lost meanwhile and was started again.

    Args:
        train: Trains from its newest checkpoint, which it loads, or from the learner's initial model.
        max_restarts: See `RestartPolicy`.
        metrics: The log of its steps: tells how far it came.

    Raises:
        UserError: It was lost too often.
        StopRequested: A stop was asked for while it was started again.
    """
    losses = RestartPolicy(max_restarts)
    while True:
        try:
            if losses.consecutive_failures:
                await interrupt.run_interruptible(learner.restart())
            return await train()
        except (LearnerDiedError, WeightIntegrityError) as error:
            loss = error if isinstance(error, LearnerDiedError) else error.__cause__
            if not isinstance(loss, LearnerDiedError):
                raise
            losses.record_failure(loss, _last_step(metrics))
            log.warning("%s; it is started again, and goes on from its newest checkpoint", loss)


def _last_step(metrics: Path) -> float:
    return max((row["step"] for row in read_metrics(metrics)), default=-1.0)
