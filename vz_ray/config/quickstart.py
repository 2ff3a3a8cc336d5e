"""Config of the quickstart: every stage from data synthesis to the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vz_ray.config.data import SynthConfig
from vz_ray.config.fields import InvalidValueError, Section, choice, number
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.sft import SftConfig
from vz_ray.config.timeouts import timeout

FAMILY_FILES = {
    "qwen2_5_vl": "conf/quickstart.yaml",
    "qwen3_vl": "conf/quickstart-qwen3_vl.yaml",
    "qwen3_vl_moe": "conf/quickstart-qwen3_vl_moe.yaml",
    "qwen3_5": "conf/quickstart-qwen3_5.yaml",
}
"""Config file of the quickstart by model family."""


def quickstart_file(overrides: Sequence[str]) -> str:
    """Return the config file of the family that the overrides name; the default is that of Qwen2.5-VL.

    An unknown family gives the default file, whose check of `family` then fails.
    """
    families = [override.partition("=")[2] for override in overrides if override.startswith("family=")]
    return FAMILY_FILES.get(families[-1] if families else "", FAMILY_FILES["qwen2_5_vl"])


@dataclass
class ReportConfig(Section):
    """Contents of the report."""

    max_episodes: int = number(8, minimum=0)
    """Maximum episodes that are shown with frames."""
    max_frames: int = number(64, minimum=1)
    """Maximum thumbnails per overview or zoom; more frames are sampled evenly."""
    max_thumbnail_px: int = number(160, minimum=1)
    """Maximum side of a thumbnail in pixels; smaller frames keep their size."""
    timeout_s: float = timeout("report_frames_s")
    """Timeout of decoding one episode's frames."""


@dataclass
class BaselineConfig(Section):
    """The uniform baseline: the same base model, trained to answer from uniform frames without the tool."""

    prompt: str = "conf/prompt/tiny-answer.yaml"
    """Prompt file without zooms."""
    train_frames: list[int] = field(default_factory=lambda: [8, 16, 32, 64])
    """Frame counts of the training samples, in turn."""
    test_frames: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128])
    """Frame counts of the evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_frames", "test_frames"):
            counts = getattr(self, name)
            if not counts or min(counts) < 1:
                raise InvalidValueError(name, f"is {counts}; it must list counts of at least 1")


@dataclass
class QuickstartConfig(GrpoRunConfig):
    """Config of `vz-ray quickstart`; every stage starts from `model` or from a stage before."""

    family: str = choice(*FAMILY_FILES)
    """Model family of the tiny model; on the command line it also selects the config file. A missing `model` is
    trained first."""
    synth: SynthConfig = field(default_factory=SynthConfig)
    """Needle videos."""
    sft_learner: LearnerConfig = field(default_factory=LearnerConfig)
    """Learner of all SFT stages."""
    cold_start: SftConfig = field(default_factory=SftConfig)
    """Cold start on exemplars."""
    sparse_zoom_share: float = number(0.0, minimum=0, maximum=1)
    """Share of the exemplars' zooms that are tried at half the required frame rate, and kept if that
    suffices."""
    sft_continued: SftConfig = field(default_factory=SftConfig)
    """Cold start continued for as long as RL training takes."""
    baseline_sft: SftConfig = field(default_factory=SftConfig)
    """Training of the uniform baseline."""
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    """Uniform baseline."""
    report: ReportConfig = field(default_factory=ReportConfig)
    """HTML report."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sft_learner.check_constant_schedule("sft_learner", "cold_start.lr_schedule")
        if self.weights.transport != "shm":
            raise InvalidValueError(
                "weights.transport",
                f"is {self.weights.transport!r}; the quickstart evaluates several models on the same engines, which "
                "requires 'shm'",
            )
        if self.learner.lora.publish == "adapters":
            raise InvalidValueError(
                "learner.lora.publish",
                "is 'adapters'; the quickstart evaluates several models on the same engines, which requires 'merged'",
            )
        if self.train.colocate:
            raise InvalidValueError(
                "train.colocate", "is true; the quickstart trains while its engines start, so it must be false"
            )
        if self.sft_continued.max_time_s:
            raise InvalidValueError(
                "sft_continued.max_time_s",
                f"is {self.sft_continued.max_time_s}; it must be 0, because the stage takes as long as RL training",
            )

    @property
    def publishes_adapters(self) -> bool:
        """False: the engines hold several models in turn."""
        return False

    @property
    def images_per_prompt(self) -> int:
        return max(self.episode.max_images, *self.baseline.test_frames)
