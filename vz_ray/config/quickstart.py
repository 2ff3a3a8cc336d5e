"""The quickstart: every stage from nothing to a report."""

from __future__ import annotations

from dataclasses import dataclass, field

from vz_ray.config.data import SynthConfig
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.report import ReportConfig
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.sft_stage import BaselineConfig, SftConfig


@dataclass
class QuickstartConfig(GrpoRunConfig):
    """A run and the stages around it; `model` is the base that all of them start from."""

    synth: SynthConfig = field(default_factory=SynthConfig)
    """The needle videos."""
    sft_learner: LearnerConfig = field(default_factory=LearnerConfig)
    """The learner of all supervised stages."""
    cold_start: SftConfig = field(default_factory=SftConfig)
    """The cold start on exemplars."""
    sparse_zoom_share: float = 0.0
    """Share of the exemplars' zooms tried at half the rate that shows all; kept where that was enough."""
    sft_continued: SftConfig = field(default_factory=SftConfig)
    """The cold start continued by more of the same, for as long as reinforcement learning took."""
    baseline_sft: SftConfig = field(default_factory=SftConfig)
    """Training of the uniform baseline."""
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    """The uniform baseline."""
    report: ReportConfig = field(default_factory=ReportConfig)
    """The HTML report."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sft_learner.model:
            raise ValueError(
                f"sft_learner.model is {self.sft_learner.model!r}; it is `model` of the run, set that instead"
            )
        if self.sft_learner.optimizer.lr_schedule != "constant":
            raise ValueError(
                f"sft_learner.optimizer.lr_schedule is {self.sft_learner.optimizer.lr_schedule!r}; "
                "each stage has its own, such as cold_start.lr_schedule"
            )
        if self.weights.transport != "shm":
            raise ValueError(
                f"weights.transport is {self.weights.transport!r}; the quickstart evaluates several models "
                "on the same engines, which takes 'shm' (`vz-ray train` takes any)"
            )
        if not 0 <= self.sparse_zoom_share <= 1:
            raise ValueError(
                f"sparse_zoom_share is {self.sparse_zoom_share}; it is a share of the exemplars' zooms, from 0 to 1"
            )
        if self.sft_continued.max_time_s:
            raise ValueError(
                f"sft_continued.max_time_s is {self.sft_continued.max_time_s}; "
                "it goes on for as long as reinforcement learning took, leave it at 0"
            )
