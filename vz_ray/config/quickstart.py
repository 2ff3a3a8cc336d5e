"""The quickstart: every stage from nothing to a report."""

from __future__ import annotations

from dataclasses import dataclass, field

from vz_ray.config.coldstart import BaselineConfig, SftConfig
from vz_ray.config.data import SynthConfig
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.run import RunConfig


@dataclass
class QuickstartConfig(RunConfig):
    """A run and the stages around it; `model` is the base that all of them start from."""

    synth: SynthConfig = field(default_factory=SynthConfig)
    """The needle videos."""
    sft_learner: LearnerConfig = field(default_factory=LearnerConfig)
    """The learner of all supervised stages."""
    cold_start: SftConfig = field(default_factory=SftConfig)
    """The cold start on exemplars."""
    sft_continued: SftConfig = field(default_factory=SftConfig)
    """The cold start continued by more of the same, for as long as reinforcement learning took."""
    baseline_sft: SftConfig = field(default_factory=SftConfig)
    """Training of the uniform baseline."""
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    """The uniform baseline."""
