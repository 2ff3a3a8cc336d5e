"""Config of task files and of the synthetic needle videos."""

from __future__ import annotations

from dataclasses import dataclass, field

from vz_ray.config.fields import InvalidValueError, Section, number


@dataclass
class SynthConfig(Section):
    """Number and encoding of the needle videos."""

    directory: str = "data/needle"
    """Directory of videos, task files and the manifest."""
    seed: int = number(0, minimum=0)
    """Seed of every video; splits share no video."""
    train: int = number(96, minimum=0)
    """Videos for RL training."""
    sft: int = number(24, minimum=0)
    """Videos for the cold start."""
    validation: int = number(12, minimum=0)
    """Videos for validation."""
    test: int = number(52, minimum=0)
    """Videos for the test."""
    shot_s: list[int] = field(default_factory=lambda: [4, 8, 16, 32])
    """Shot lengths in seconds; a video has sixteen shots of one length."""
    questions: int = number(4, minimum=1, maximum=4, reason=" (one per border colour)")
    """Questions per video, from 1 to 4 (one per border colour)."""
    fps: int = number(8, minimum=1)
    """Frame rate."""
    side: int = 112
    """Width and height in pixels."""
    gop: int = number(250, minimum=1)
    """Maximum frames between keyframes."""
    b_frames: int = number(2, minimum=0, maximum=16)
    """Consecutive B-frames."""
    crf: int = number(23, minimum=0, maximum=51)
    """Constant rate factor of x264; lower is better quality."""
    workers: int = number(2, minimum=1)
    """Encoder processes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shot_s or min(self.shot_s) < 1:
            raise InvalidValueError("shot_s", f"is {self.shot_s}; it must list lengths of at least 1 second")
        if self.side < 32 or self.side % 4:
            raise InvalidValueError("side", f"is {self.side}; it must be at least 32 and a multiple of 4")

    @property
    def videos(self) -> dict[str, int]:
        """Number of videos per split."""
        return {"train": self.train, "sft": self.sft, "validation": self.validation, "test": self.test}


@dataclass
class DataConfig(Section):
    """Task files of a run."""

    train: str = "data/needle/train.json"
    """Tasks for RL training (RL schema)."""
    sft: str = "data/needle/sft.json"
    """Tasks for the cold start's exemplars."""
    validation: str = "data/needle/validation.json"
    """Tasks for validation."""
    test: str = "data/needle/test.json"
    """Tasks for the test."""
