"""Supervised training on written turns: the cold start, its continuation, the uniform baseline."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SftConfig:
    """How long to train on written turns, and in what batches."""

    steps: int = 100
    """Most optimizer steps."""
    max_seconds: float = 0.0
    """Stop after this much training time even if steps are left; 0 never does."""
    batch: int = 16
    """Trajectories in a step."""
    schedule: str = "constant"
    """Of the learning rate: `constant`, or `cosine` down to 0 at `steps`."""
    keep_checkpoints: int = 1
    """Newest checkpoints kept; older ones are deleted."""

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"sft.schedule is {self.schedule!r}; it must be 'constant' or 'cosine'")
        if self.schedule == "cosine" and self.max_seconds:
            raise ValueError("sft.schedule cosine ends at sft.steps; it does not go with sft.max_seconds")
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"sft.steps ({self.steps}) and sft.batch ({self.batch}) must be at least 1")
        if self.keep_checkpoints < 1:
            raise ValueError(f"sft.keep_checkpoints is {self.keep_checkpoints}; it must be at least 1")
        if self.max_seconds < 0:
            raise ValueError(f"sft.max_seconds is {self.max_seconds}; it must not be negative")


@dataclass
class BaselineConfig:
    """The uniform baseline: the same base, trained to answer from uniform frames without the tool."""

    prompt: str = "conf/prompt/tiny-answer.yaml"
    """Its wording, which mentions no zoom."""
    train_frames: list[int] = field(default_factory=lambda: [8, 16, 32, 64])
    """Frame counts that it is trained on, in turn."""
    test_frames: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128])
    """Frame counts that it is tested at."""

    def __post_init__(self) -> None:
        for name in ("train_frames", "test_frames"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"baseline.{name} is {getattr(self, name)}; it needs counts of at least 1")
