"""Config of distillation: teacher, filters, data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vz_ray.config.fields import InvalidValueError, Section, check_at_most, choice, number
from vz_ray.config.reward import EndpointConfig, RewardConfig
from vz_ray.config.run import RunConfig
from vz_ray.config.timeouts import timeout


@dataclass
class TeacherConfig(EndpointConfig):
    """Teacher model behind an OpenAI-compatible chat endpoint, and its limits."""

    prompt: str = "conf/prompt/teacher.yaml"
    """Instructions in addition to the episode's prompt."""
    image_format: str = choice("jpeg", "png")
    """Encoding of frames in requests: `jpeg` or `png`."""
    temperature: float = number(1.0, minimum=0)
    """Sampling temperature; several attempts per task need one above 0."""
    top_p: float = number(1.0, above=0, maximum=1)
    """Nucleus sampling."""
    max_tokens_param: str = "max_tokens"
    """Request parameter for the maximum reply tokens; some models use `max_completion_tokens`."""
    parameters: dict[str, Any] = field(default_factory=lambda: {"stop": ["</video_zoom>"]})
    """Parameters of every request; null removes one, including `temperature` and `top_p`."""
    max_concurrency: int = number(8, minimum=1)
    """Maximum concurrent requests."""
    request_timeout_s: float = timeout("teacher_request_s")
    """Timeout of one request."""
    turn_timeout_s: float = timeout("teacher_turn_s")
    """Timeout of one turn, including all retries."""
    episode_timeout_s: float = timeout("teacher_episode_s")
    """Timeout of one episode, including waits for rate limits."""
    requests_per_minute: int = number(0, minimum=0)
    """Maximum requests per 60 s; 0 sets no limit."""
    tokens_per_minute: int = number(0, minimum=0)
    """Maximum tokens per 60 s, including prompts; 0 sets no limit."""
    tokens_per_image: int = number(300, minimum=1)
    """Maximum tokens of a frame, for estimates before a request; raised if the server counts more."""
    input_usd_per_mtok: float = number(0.0, minimum=0)
    """Price of a million prompt tokens in USD."""
    output_usd_per_mtok: float = number(0.0, minimum=0)
    """Price of a million reply tokens in USD."""
    max_cost_usd: float = number(0.0, minimum=0)
    """Maximum cost in USD; requests that could exceed it are not sent. 0 sets no limit."""
    max_consecutive_failures: int = number(8, minimum=1)
    """Consecutive episodes that fail because of the teacher before the run stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens_param in self.parameters:
            raise InvalidValueError("parameters", f"has {self.max_tokens_param!r}, which is reserved; remove it")
        if self.max_cost_usd and not self.input_usd_per_mtok + self.output_usd_per_mtok:
            raise InvalidValueError(
                "max_cost_usd",
                f"is {self.max_cost_usd:g}, but both prices are 0; set input_usd_per_mtok and output_usd_per_mtok",
                "input_usd_per_mtok",
                "output_usd_per_mtok",
            )


@dataclass
class FilterConfig(Section):
    """Selection of the episodes that become training data."""

    min_pass_rate: float = number(0.01, minimum=0, maximum=1)
    """Minimum share of correct attempts at a task."""
    max_pass_rate: float = number(1.0, minimum=0, maximum=1)
    """Maximum share of correct attempts at a task; below 1 drops easy tasks."""
    max_per_task: int = number(1, minimum=1)
    """Maximum episodes per task."""
    require_format: bool = True
    """Keep only well-formed transcripts."""
    require_zoom: bool = True
    """Keep only episodes with a zoom."""
    held_out: list[str] = field(default_factory=list)
    """Task files of evaluation sets; episodes with their videos or questions are dropped."""
    max_ngram_overlap: float = number(0.8, minimum=0, maximum=1)
    """Share of a question's word n-grams in a held-out question above which both count as equal; 0 compares
    no questions (if all questions of a kind have the same wording)."""
    ngram_size: int = number(5, minimum=1)
    """Words per n-gram."""
    max_pattern_share: float = number(1.0, above=0, maximum=1)
    """Maximum share of one zoom pattern in the kept episodes."""
    max_turns_share: float = number(1.0, above=0, maximum=1)
    """Maximum share of one number of turns in the kept episodes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_most(self, "min_pass_rate", "max_pass_rate")


@dataclass
class DistillRunConfig(RunConfig):
    """Common config of both distillation commands."""

    name: str = "distill"
    model: str = ""
    """Checkpoint directory of the student; its tokenizer encodes the episodes."""
    max_concurrent_episodes: int = number(16, minimum=1)
    """Maximum concurrent episodes."""
    image_format: str = choice("png", "jpeg")
    """Encoding of kept frames: `png` is lossless, or `jpeg`."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """Teacher model."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    """Selection of episodes."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Reward of an episode."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher.model:
            raise InvalidValueError("teacher.model", "is empty; set teacher.model and teacher.base_url")
        if not self.model:
            raise InvalidValueError("model", "is empty; set it to the student's checkpoint directory")


@dataclass
class ExemplarRunConfig(DistillRunConfig):
    """Config of `vz-ray distill exemplar`: the teacher solves tasks."""

    tasks: str = ""
    """Task file (RL schema)."""
    attempts_per_task: int = number(4, minimum=1)
    """Episodes per task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise InvalidValueError("tasks", "is empty; set it to a task file")


@dataclass
class ReflectionRunConfig(DistillRunConfig):
    """Config of `vz-ray distill reflect`: the teacher corrects wrong episodes of the policy."""

    episodes: list[str] = field(default_factory=list)
    """Episode logs of the policy (`runs/x/episodes/*.jsonl`), or their directories."""
    max_wrong_per_task: int = number(2, minimum=1)
    """Maximum wrong episodes per task that are corrected."""
    prompt: str = "conf/prompt/reflect.yaml"
    """Instructions for the turn that the teacher corrects."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.episodes:
            raise InvalidValueError("episodes", "is empty; set it to episode logs of the policy")
        if self.episode.max_rounds < 3:
            raise InvalidValueError(
                "episode.max_rounds",
                f"is {self.episode.max_rounds}; it must be at least 3: zoom, correction, answer",
            )
