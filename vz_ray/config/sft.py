"""A cold start on trajectories from a file: supervised training alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from vz_ray.config.clips import ClipsConfig
from vz_ray.config.coldstart import SftConfig
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.observe import WatchConfig
from vz_ray.config.run import RayConfig


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
    observe: WatchConfig = field(default_factory=WatchConfig)
    """What is told of the run, and to whom."""

    def __post_init__(self) -> None:
        if self.learner.model:
            raise ValueError(
                f"learner.model is {self.learner.model!r}; it is `model` of the run, set that instead"
            )
        self.learner.check_longest(self.episode.max_context)
        if self.learner.optimizer.schedule != "constant":
            raise ValueError(
                f"learner.optimizer.schedule is {self.learner.optimizer.schedule!r}; it is sft.schedule"
            )
