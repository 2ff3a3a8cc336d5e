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

from vz_ray.learner.actor import LearnerGroup, LearnerLost
from vz_ray.observe.errors import UserError
from vz_ray.observe.interrupt import Interrupt
from vz_ray.observe.metrics import read_metrics
from vz_ray.weights.store import WeightsBroken

T = TypeVar("T")

log = logging.getLogger(__name__)


class Losses:
    """Counts the losses of a learner in a row. Pure.

    Args:
        most: Longest row that is put up with.

    Attributes:
        row: Losses since training last came further than it had ever been.
    """

    def __init__(self, most: int) -> None:
        self._most, self._furthest, self.row = most, -1.0, 0

    def add(self, loss: Exception, step: float) -> None:
        """One more; `step` is the last whole one that is done, -1 if none is.

        Raises:
            UserError: It is one too many.
        """
        if step > self._furthest:
            self._furthest, self.row = step, 0
        self.row += 1
        if self.row > self._most:
            raise UserError(
                f"{loss}; that is loss {self.row} of the learner in a row without a step that had not been "
                f"done before, above learner.restarts ({self._most}): find out what ends the process (memory "
                "is the usual reason; then lower learner.micro_batch_tokens or add ranks); the same command "
                "goes on from the last checkpoint"
            ) from loss


async def restarting(
    learner: LearnerGroup,
    work: Callable[[], Awaitable[T]],
    *,
    most: int,
    metrics: Path,
    interrupt: Interrupt,
) -> T:
    """Awaits `work()`, again for each time that the learner is lost meanwhile and was started again.

    Args:
        work: Trains from its newest checkpoint, which it loads, or from the learner's initial model.
        most: See `Losses`.
        metrics: The log of its steps: tells how far it came.

    Raises:
        UserError: It was lost too often.
        StopRequested: A stop was asked for while it was started again.
    """
    losses = Losses(most)
    while True:
        try:
            if losses.row:
                await interrupt.watch(learner.restart())
            return await work()
        except (LearnerLost, WeightsBroken) as error:
            loss = error if isinstance(error, LearnerLost) else error.__cause__
            if not isinstance(loss, LearnerLost):
                raise
            losses.add(loss, _last_step(metrics))
            log.warning("%s; it is started again, and goes on from its newest checkpoint", loss)


def _last_step(metrics: Path) -> float:
    return max((row["step"] for row in read_metrics(metrics)), default=-1.0)
