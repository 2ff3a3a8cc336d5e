"""How far a supervised run has come, and which trajectories come next; the same with Ray and without."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from vz_ray.config.sft import SftConfig
from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.step_dirs import list_steps

CHECKPOINT_INTERVAL_S = 30.0
"""Training seconds between checkpoints."""
STATE_FILE, LEARNER_DIR = "sft.json", "learner"
"""What a checkpoint of a supervised run holds: this state, and the learner's own checkpoint."""


@dataclass(frozen=True, slots=True)
class SftState:
    """How far a supervised stage has come.

    Attributes:
        steps: Optimizer steps done.
        seconds: Training seconds spent on them.
        samples: Trajectories seen, repetitions counted.
    """

    steps: int = 0
    seconds: float = 0.0
    samples: int = 0

    @classmethod
    def load(cls, checkpoints: Path) -> SftState:
        """That of the newest checkpoint; the beginning if there is none."""
        found = list_steps(checkpoints)
        return cls(**json.loads((found[-1] / STATE_FILE).read_text())) if found else cls()

    def save(self, checkpoint: Path) -> None:
        """Into the directory of a checkpoint."""
        write_atomic(checkpoint / STATE_FILE, json.dumps(asdict(self)).encode())

    def is_done(self, config: SftConfig) -> bool:
        late = 0 < config.max_time_s <= self.seconds
        return late or self.steps >= config.max_steps


def batch_indices(count: int, batch: int, seed: int, start: int = 0) -> Iterator[list[int]]:
    """Indices of each step's trajectories from step `start` on: every trajectory once an epoch, shuffled."""
    if count < 1:
        raise ValueError("no trajectories to train on")
    step = start
    while True:
        yield [_order(count, seed, at // count)[at % count] for at in range(step * batch, (step + 1) * batch)]
        step += 1


def _order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
