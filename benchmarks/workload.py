"""Fixed loads, so that compared systems are given the same work."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Workload:
    """Zooms, tokens and frames of episodes, and how long clips take."""

    episodes: Sequence[dict[str, Any]]
    clip_ms: Sequence[float]

    @classmethod
    def load(cls, path: Path | None) -> Workload:
        """From a file with `episodes` and `clip_latency_ms`; without one, drawn from a like distribution."""
        if path is not None and path.exists():
            content = json.loads(path.read_text())
            return cls(content["episodes"], content["clip_latency_ms"])
        draw = random.Random(0)
        shapes = [draw.choice([0, 1, 1, 2, 2, 2, 3, 4]) for _ in range(512)]
        episodes = [
            {
                "turn_tokens": [int(draw.lognormvariate(4, 0.6)) for _ in range(zooms + 1)],
                "clip_frames": [draw.choice([4, 8, 12, 16]) for _ in range(zooms)],
            }
            for zooms in shapes
        ]
        return cls(episodes, [min(1700.0, draw.lognormvariate(4.1, 0.9)) for _ in range(2000)])

    def shape(self, task: int, sample: int, samples: int) -> dict[str, Any]:
        return self.episodes[(task * samples + sample) % len(self.episodes)]
