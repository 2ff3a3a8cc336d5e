"""Fixed workloads, so that compared systems do the same work."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Workload:
    """Episodes (tokens per turn, frames per clip) and clip latencies in milliseconds."""

    episodes: Sequence[dict[str, Any]]
    clip_ms: Sequence[float]

    @classmethod
    def load(cls, path: Path | None) -> Workload:
        """Load a file with `episodes` and `clip_latency_ms`; without a file, sample a similar distribution."""
        if path is not None and path.exists():
            content = json.loads(path.read_text())
            return cls(content["episodes"], content["clip_latency_ms"])
        rng = random.Random(0)
        shapes = [rng.choice([0, 1, 1, 2, 2, 2, 3, 4]) for _ in range(512)]
        episodes = [
            {
                "turn_tokens": [int(rng.lognormvariate(4, 0.6)) for _ in range(zooms + 1)],
                "clip_frames": [rng.choice([4, 8, 12, 16]) for _ in range(zooms)],
            }
            for zooms in shapes
        ]
        return cls(episodes, [min(1700.0, rng.lognormvariate(4.1, 0.9)) for _ in range(2000)])

    def with_shorter_clips(self, divisor: int) -> Workload:
        """Return the workload with the frames of each clip divided by `divisor`, rounded up."""
        episodes = [
            {**episode, "clip_frames": [-(-count // divisor) for count in episode["clip_frames"]]}
            for episode in self.episodes
        ]
        return Workload(episodes, self.clip_ms)

    def shape(self, task: int, sample: int, group_size: int) -> dict[str, Any]:
        """Return the episode of a sample of a task."""
        return self.episodes[(task * group_size + sample) % len(self.episodes)]
