"""Supervised training on written turns: the cold start, its continuation, the uniform baseline."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SftConfig:
    """How long to train on written turns, and in what batches."""

    max_steps: int = 100
    """Most optimizer steps."""
    max_time_s: float = 0.0
    """Stop after this much training time even if steps are left; 0 never does."""
    batch_size: int = 16
    """Trajectories in a step."""
    lr_schedule: str = "constant"
    """Of the learning rate: `constant`, or `cosine` down to 0 at `steps`."""
    keep_checkpoints: int = 1
    """Newest checkpoints kept; older ones are deleted."""

    def __post_init__(self) -> None:
        if self.lr_schedule not in ("constant", "cosine"):
            raise ValueError(f"sft.lr_schedule is {self.lr_schedule!r}; it must be 'constant' or 'cosine'")
        if self.lr_schedule == "cosine" and self.max_time_s:
            raise ValueError(
                "sft.lr_schedule cosine ends at sft.max_steps; it does not go with sft.max_time_s"
            )
        if self.max_steps < 1 or self.batch_size < 1:
            raise ValueError(
                f"sft.max_steps ({self.max_steps}) and sft.batch_size ({self.batch_size}) must be at least 1"
            )
        if self.keep_checkpoints < 1:
            raise ValueError(f"sft.keep_checkpoints is {self.keep_checkpoints}; it must be at least 1")
        if self.max_time_s < 0:
            raise ValueError(f"sft.max_time_s is {self.max_time_s}; it must not be negative")


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
