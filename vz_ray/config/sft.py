"""Config of supervised fine-tuning (SFT)."""

from __future__ import annotations

from dataclasses import dataclass, field

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.fields import InvalidValueError, Section, choice, number
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.run import RunConfig, frames_mib


@dataclass
class SftConfig(Section):
    """Duration and batches of an SFT stage."""

    max_steps: int = number(100, minimum=1)
    """Maximum optimizer steps."""
    max_time_s: float = number(0.0, minimum=0)
    """Maximum training time in seconds; 0 sets no limit."""
    batch_size: int = number(16, minimum=1)
    """Trajectories per step."""
    lr_schedule: str = choice("constant", "cosine")
    """Learning rate schedule: `constant`, or `cosine` down to 0 at `max_steps`."""
    keep_checkpoints: int = number(1, minimum=1)
    """Newest checkpoints to keep."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_schedule == "cosine" and self.max_time_s:
            raise InvalidValueError(
                "lr_schedule",
                "is cosine, which ends at max_steps; it cannot be used with max_time_s",
                "max_time_s",
            )


@dataclass
class SftRunConfig(RunConfig):
    """Config of `vz-ray sft`."""

    name: str = "sft"
    data: str = ""
    """Training data: episode logs of vz_ray (`episodes/*.jsonl`), or samples with `messages` and `images` (a
    JSON list or JSON lines; paths are relative to the file)."""
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    """Episode limits and prompts. Episode logs must match them. Samples bring their own prompts and use only
    the chat format, frame sizes and `max_context`."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """Learner; its learning rate schedule follows `sft`."""
    sft: SftConfig = field(default_factory=SftConfig)
    """Duration and batches."""

    @property
    def step_frames_mib(self) -> int:
        """Maximum size of a step's frames per learner rank, in MiB."""
        return frames_mib(self.sft.batch_size * self.episode.max_images, self.episode, self.learner)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.learner.check_max_context("learner", self.episode.max_context)
        self.learner.check_constant_schedule("learner", "sft.lr_schedule")
