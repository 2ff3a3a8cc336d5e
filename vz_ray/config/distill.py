"""Config of distillation: teacher, filters, data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vz_ray.config.clips import ClipsConfig
from vz_ray.config.derived import set_derived_values, timeout
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.monitoring import TrackingConfig
from vz_ray.config.ray import RayConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.config.timeouts import TimeoutsConfig
from vz_ray.config.validation import (
    InvalidValueError,
    check_choice,
    check_endpoint,
    check_fraction,
    check_min,
    check_not_negative,
    check_positive,
)

IMAGE_FORMATS = ("jpeg", "png")


@dataclass
class TeacherConfig:
    """Teacher model behind an OpenAI-compatible chat endpoint, and its limits."""

    model: str = ""
    """Model name at the endpoint."""
    base_url: str = ""
    """Endpoint, for example `http://teacher:8000/v1`."""
    api_key_env: str = ""
    """Environment variable with the API key; empty sends no key."""
    prompt: str = "conf/prompt/teacher.yaml"
    """Instructions in addition to the episode's prompt."""
    image_format: str = "jpeg"
    """Encoding of frames in requests: `jpeg` or `png`."""
    temperature: float = 1.0
    """Sampling temperature; several attempts per task need one above 0."""
    top_p: float = 1.0
    """Nucleus sampling."""
    max_tokens_param: str = "max_tokens"
    """Request parameter for the maximum reply tokens; some models use `max_completion_tokens`."""
    parameters: dict[str, Any] = field(default_factory=lambda: {"stop": ["</video_zoom>"]})
    """Parameters of every request; null removes one, including `temperature` and `top_p`."""
    max_concurrency: int = 8
    """Maximum concurrent requests."""
    max_attempts: int = 6
    """Maximum requests per turn; 429, 5xx, timeouts, lost connections and invalid completions are retried."""
    backoff_s: float = 1.0
    """Wait before the first retry in seconds, doubled for each further one; a longer `Retry-After` is
    respected."""
    request_timeout_s: float = timeout("teacher_request_s")
    """Timeout of one request."""
    turn_timeout_s: float = timeout("teacher_turn_s")
    """Timeout of one turn, including all retries."""
    episode_timeout_s: float = timeout("teacher_episode_s")
    """Timeout of one episode, including waits for rate limits."""
    requests_per_minute: int = 0
    """Maximum requests per 60 s; 0 sets no limit."""
    tokens_per_minute: int = 0
    """Maximum tokens per 60 s, including prompts; 0 sets no limit."""
    tokens_per_image: int = 300
    """Maximum tokens of a frame, for estimates before a request; raised if the server counts more."""
    input_usd_per_mtok: float = 0.0
    """Price of a million prompt tokens in USD."""
    output_usd_per_mtok: float = 0.0
    """Price of a million reply tokens in USD."""
    max_cost_usd: float = 0.0
    """Maximum cost in USD; requests that could exceed it are not sent. 0 sets no limit."""
    max_consecutive_failures: int = 8
    """Consecutive episodes that fail because of the teacher before the run stops."""

    def __post_init__(self) -> None:
        check_endpoint(self, self.max_tokens_param)
        check_choice(self, "image_format", IMAGE_FORMATS)
        check_min(self, 1, "tokens_per_image", "max_consecutive_failures")
        check_not_negative(self, "requests_per_minute", "tokens_per_minute")
        check_not_negative(self, "input_usd_per_mtok", "output_usd_per_mtok", "max_cost_usd")
        if self.max_cost_usd and not self.input_usd_per_mtok + self.output_usd_per_mtok:
            raise InvalidValueError(
                "max_cost_usd",
                f"is {self.max_cost_usd:g}, but both prices are 0; set input_usd_per_mtok and output_usd_per_mtok",
                "input_usd_per_mtok",
                "output_usd_per_mtok",
            )


@dataclass
class FilterConfig:
    """Selection of the episodes that become training data."""

    min_pass_rate: float = 0.01
    """Minimum share of correct attempts at a task."""
    max_pass_rate: float = 1.0
    """Maximum share of correct attempts at a task; below 1 drops easy tasks."""
    max_per_task: int = 1
    """Maximum episodes per task."""
    require_format: bool = True
    """Keep only well-formed transcripts."""
    require_zoom: bool = True
    """Keep only episodes with a zoom."""
    held_out: list[str] = field(default_factory=list)
    """Task files of evaluation sets; episodes with their videos or questions are dropped."""
    max_ngram_overlap: float = 0.8
    """Share of a question's word n-grams in a held-out question above which both count as equal; 0 compares
    no questions (if all questions of a kind have the same wording)."""
    ngram_size: int = 5
    """Words per n-gram."""
    max_pattern_share: float = 1.0
    """Maximum share of one zoom pattern in the kept episodes."""
    max_turns_share: float = 1.0
    """Maximum share of one number of turns in the kept episodes."""

    def __post_init__(self) -> None:
        check_fraction(self, "min_pass_rate", "max_pass_rate", "max_ngram_overlap")
        if self.min_pass_rate > self.max_pass_rate:
            raise InvalidValueError(
                "min_pass_rate",
                f"is {self.min_pass_rate}; it must be at most max_pass_rate ({self.max_pass_rate})",
                "max_pass_rate",
            )
        check_fraction(self, "max_pattern_share", "max_turns_share")
        check_positive(self, "max_pattern_share", "max_turns_share")
        check_min(self, 1, "max_per_task", "ngram_size")


@dataclass
class DistillRunConfig:
    """Common config of both distillation commands."""

    name: str = "distill"
    """Name of the run directory in `runs`."""
    runs: str = "runs"
    """Parent of run directories."""
    seed: int = 0
    """Seed of the balancing filters."""
    model: str = ""
    """Checkpoint directory of the student; its tokenizer encodes the episodes."""
    max_concurrent_episodes: int = 16
    """Maximum concurrent episodes."""
    image_format: str = "png"
    """Encoding of kept frames: `png` is lossless, or `jpeg`."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """Teacher model."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    """Selection of episodes."""
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    """Limits and prompts of an episode."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Reward of an episode."""
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    """Decode pool."""
    timeouts: TimeoutsConfig = field(default_factory=TimeoutsConfig)
    """Timeouts."""
    ray: RayConfig = field(default_factory=RayConfig)
    """Ray cluster of the decode pool."""
    monitoring: TrackingConfig = field(default_factory=TrackingConfig)
    """Logs, metrics and trackers."""

    def __post_init__(self) -> None:
        set_derived_values(self)
        if not self.teacher.model:
            raise InvalidValueError("teacher.model", "is empty; set teacher.model and teacher.base_url")
        if not self.model:
            raise InvalidValueError("model", "is empty; set it to the student's checkpoint directory")
        check_min(self, 1, "max_concurrent_episodes")
        check_choice(self, "image_format", IMAGE_FORMATS)


@dataclass
class ExemplarRunConfig(DistillRunConfig):
    """Config of `vz-ray distill exemplar`: the teacher solves tasks."""

    tasks: str = ""
    """Task file (RL schema)."""
    attempts_per_task: int = 4
    """Episodes per task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise InvalidValueError("tasks", "is empty; set it to a task file")
        check_min(self, 1, "attempts_per_task")


@dataclass
class ReflectionRunConfig(DistillRunConfig):
    """Config of `vz-ray distill reflect`: the teacher corrects wrong episodes of the policy."""

    episodes: list[str] = field(default_factory=list)
    """Episode logs of the policy (`runs/x/episodes/*.jsonl`), or their directories."""
    max_wrong_per_task: int = 2
    """Maximum wrong episodes per task that are corrected."""
    prompt: str = "conf/prompt/reflect.yaml"
    """Instructions for the turn that the teacher corrects."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.episodes:
            raise InvalidValueError("episodes", "is empty; set it to episode logs of the policy")
        check_min(self, 1, "max_wrong_per_task")
        if self.episode.max_rounds < 3:
            raise InvalidValueError(
                "episode.max_rounds",
                f"is {self.episode.max_rounds}; it must be at least 3: zoom, correction, answer",
            )
