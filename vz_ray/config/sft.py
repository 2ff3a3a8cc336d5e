"""Config of supervised fine-tuning (SFT)."""

from __future__ import annotations

from dataclasses import dataclass, field

from vz_ray.config.clips import ClipsConfig
from vz_ray.config.derived import set_derived_values
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.monitoring import TrackingConfig
from vz_ray.config.ray import RayConfig
from vz_ray.config.timeouts import TimeoutsConfig
from vz_ray.config.validation import InvalidValueError, check_choice, check_min, check_not_negative

LR_SCHEDULES = ("constant", "cosine")


@dataclass
class SftConfig:
    """Duration and batches of an SFT stage."""

    max_steps: int = 100
    """Maximum optimizer steps."""
    max_time_s: float = 0.0
    """Maximum training time in seconds; 0 sets no limit."""
    batch_size: int = 16
    """Trajectories per step."""
    lr_schedule: str = "constant"
    """Learning rate schedule: `constant`, or `cosine` down to 0 at `max_steps`."""
    keep_checkpoints: int = 1
    """Newest checkpoints to keep."""

    def __post_init__(self) -> None:
        check_choice(self, "lr_schedule", LR_SCHEDULES)
        if self.lr_schedule == "cosine" and self.max_time_s:
            raise InvalidValueError(
                "lr_schedule",
                "is cosine, which ends at max_steps; it cannot be used with max_time_s",
                "max_time_s",
            )
        check_min(self, 1, "max_steps", "batch_size", "keep_checkpoints")
        check_not_negative(self, "max_time_s")


@dataclass
class SftRunConfig:
    """Config of `vz-ray sft`."""

    name: str = "sft"
    """Name of the run directory in `runs`."""
    runs: str = "runs"
    """Parent of run directories."""
    seed: int = 0
    """Seed of the batch order."""
    model: str = ""
    """Checkpoint directory of the initial model."""
    data: str = ""
    """Training data: episode logs of vz_ray (`episodes/*.jsonl`), or samples with `messages` and `images` (a
    JSON list or JSON lines; paths are relative to the file)."""
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    """Episode limits and prompts. Episode logs must match them. Samples bring their own prompts and use only
    the chat format, frame sizes and `max_context`."""
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    """Decode pool."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """Learner; its learning rate schedule follows `sft`."""
    sft: SftConfig = field(default_factory=SftConfig)
    """Duration and batches."""
    timeouts: TimeoutsConfig = field(default_factory=TimeoutsConfig)
    """Timeouts."""
    ray: RayConfig = field(default_factory=RayConfig)
    """Ray cluster."""
    monitoring: TrackingConfig = field(default_factory=TrackingConfig)
    """Logs, metrics and trackers."""

    def __post_init__(self) -> None:
        set_derived_values(self)
        self.learner.check_max_context("learner", self.episode.max_context)
        self.learner.check_constant_schedule("learner", "sft.lr_schedule")
