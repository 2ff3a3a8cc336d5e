"""Which tasks, and the needle world's sizes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SynthConfig:
    """How many needle videos to make, and how they are encoded."""

    directory: str = "data/needle"
    """Where videos, task files and the manifest go."""
    seed: int = 0
    """Makes every video; splits never share one."""
    train: int = 96
    """Videos for reinforcement learning."""
    sft: int = 24
    """Videos for the cold start."""
    validation: int = 12
    """Videos for watching training."""
    test: int = 52
    """Videos for the reported numbers."""
    shot_s: list[int] = field(default_factory=lambda: [4, 8, 16, 32])
    """Lengths of a shot, seconds; a video is sixteen shots, its length drawn from these."""
    questions: int = 4
    """Questions per video, at most one per border colour."""
    fps: int = 8
    """Frame rate of the files."""
    side: int = 112
    """Width and height of the files, pixels."""
    gop: int = 250
    """Most frames from one keyframe to the next."""
    b_frames: int = 2
    """Consecutive B-frames."""
    crf: int = 23
    """x264's constant rate factor: lower is finer."""
    workers: int = 2
    """Processes that encode."""

    def __post_init__(self) -> None:
        if not self.shot_s or min(self.shot_s) < 1:
            raise ValueError(f"synth.shot_s is {self.shot_s}; it needs lengths of at least 1 second")
        if not 1 <= self.questions <= 4:
            raise ValueError(
                f"synth.questions is {self.questions}; it must be 1 to 4 (one per border colour)"
            )
        if self.side < 32 or self.side % 4:
            raise ValueError(f"synth.side is {self.side}; it must be at least 32 and a multiple of 4")
        if self.fps < 1 or self.workers < 1:
            raise ValueError(f"synth.fps ({self.fps}) and synth.workers ({self.workers}) must be at least 1")

    @property
    def videos(self) -> dict[str, int]:
        """Videos of each split."""
        return {"train": self.train, "sft": self.sft, "validation": self.validation, "test": self.test}


@dataclass
class DataConfig:
    """The task files of a run."""

    train: str = "data/needle/train.json"
    """Tasks for reinforcement learning (RL schema)."""
    sft: str = "data/needle/sft.json"
    """Tasks that the cold start's exemplars are played on."""
    validation: str = "data/needle/validation.json"
    """Tasks for watching training."""
    test: str = "data/needle/test.json"
    """Tasks for the reported numbers."""
