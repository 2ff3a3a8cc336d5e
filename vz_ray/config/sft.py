"""A cold start on trajectories from a file: supervised training alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from vz_ray.config.clips import ClipsConfig
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.monitoring import TrackingConfig
from vz_ray.config.run import RayConfig
from vz_ray.config.sft_stage import SftConfig


@dataclass
class SftRunConfig:
    """One supervised run; `vz-ray sft conf/x.yaml key=value` fills it in."""

    name: str = "sft"
    """Directory of the run under `runs`."""
    runs: str = "runs"
    """Where run directories are made."""
    seed: int = 0
    """Order of the trajectories."""
    model: str = ""
    """Checkpoint directory that training starts from."""
    data: str = ""
    """What is to be imitated: episodes of this project (`episodes/*.jsonl`), or samples with `messages` and
    `images` (a JSON list, or one on each line; paths are relative to the file)."""
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    """Wording and limits: those that episodes were made with, which is checked; of samples, which bring
    their own wording, only the chat format, sizes of frames and the longest context."""
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    """The decoders."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """Who learns; its schedule is that of `sft`."""
    sft: SftConfig = field(default_factory=SftConfig)
    """How long, and in what batches."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster."""
    monitoring: TrackingConfig = field(default_factory=TrackingConfig)
    """What is told of the run, and to whom."""

    def __post_init__(self) -> None:
        if self.learner.model:
            raise ValueError(
                f"learner.model is {self.learner.model!r}; it is `model` of the run, set that instead"
            )
        self.learner.check_max_context(self.episode.max_context)
        if self.learner.optimizer.lr_schedule != "constant":
            raise ValueError(
                f"learner.optimizer.lr_schedule is {self.learner.optimizer.lr_schedule!r}; it is sft.lr_schedule"
            )
