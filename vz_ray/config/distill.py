"""Distillation: which expert plays, what it may cost, and which of its episodes are kept."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from vz_ray.config.clips import ClipsConfig
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.monitoring import TrackingConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.config.run import RayConfig

IMAGE_FORMATS = ("jpeg", "png")


@dataclass
class TeacherConfig:
    """A model behind an OpenAI-compatible chat endpoint that plays episodes, and its limits.

    Attributes:
        model: Its name there.
        base_url: The endpoint, such as `http://expert:8000/v1`.
        api_key_env: Environment variable that holds the key; empty for a server that needs none.
        prompt: What it is told beyond the episode's own wording; see `conf/prompt/teacher.yaml`.
        image_format: How frames are sent, `jpeg` or `png`.
        temperature: Its sampling temperature; several attempts at a task need some.
        top_p: Its nucleus mass.
        max_tokens_param: What the most tokens of a reply are called there; some hosted models want
            `max_completion_tokens`.
        parameters: Sent with every request; null leaves one out, also `temperature` and `top_p`.
        max_concurrency: Most requests in flight.
        max_attempts: Most requests for one turn; 429, 5xx, timeouts, lost connections and replies that are
            no completion are tried again.
        backoff_s: Wait before the second attempt, doubled with each further one; a server's
            `Retry-After` counts where it is longer.
        request_timeout_s: Seconds that one request may take.
        turn_timeout_s: Seconds that a turn may take: all its requests, and the waits between them.
        episode_timeout_s: Seconds that an episode may take; waiting for the limits below counts too.
        requests_per_minute: Most requests in any 60 s; 0 has no limit.
        tokens_per_minute: Most tokens in any 60 s, those of prompts included; 0 has no limit.
        tokens_per_image: Tokens that a frame takes at most, for estimates made before a request; they are
            raised where the server counts more.
        input_usd_per_mtok: Price of a million tokens of prompts.
        output_usd_per_mtok: Price of a million tokens of replies.
        max_cost_usd: Nothing is asked that could bring the cost above this; 0 has no limit.
        max_consecutive_failures: Episodes in a row that may fail because of the expert before the run stops.
    """

    model: str = ""
    base_url: str = ""
    api_key_env: str = ""
    prompt: str = "conf/prompt/teacher.yaml"
    image_format: str = "jpeg"
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens_param: str = "max_tokens"
    parameters: dict[str, Any] = field(default_factory=lambda: {"stop": ["</video_zoom>"]})
    max_concurrency: int = 8
    max_attempts: int = 6
    backoff_s: float = 1.0
    request_timeout_s: float = 180.0
    turn_timeout_s: float = 900.0
    episode_timeout_s: float = 3600.0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    tokens_per_image: int = 300
    input_usd_per_mtok: float = 0.0
    output_usd_per_mtok: float = 0.0
    max_cost_usd: float = 0.0
    max_consecutive_failures: int = 8

    def __post_init__(self) -> None:
        if self.model and not re.match(r"https?://", self.base_url):
            raise ValueError(
                f"expert.base_url is {self.base_url!r}; with expert.model {self.model!r} it must be the "
                "endpoint's address, such as http://expert:8000/v1"
            )
        if self.image_format not in IMAGE_FORMATS:
            raise ValueError(
                f"teacher.image_format is {self.image_format!r}; it must be one of {', '.join(IMAGE_FORMATS)}"
            )
        taken = [
            name
            for name in ("model", "messages", "stream", "n", self.max_tokens_param)
            if name in self.parameters
        ]
        if taken:
            raise ValueError(f"expert.parameters has {taken[0]!r}, which is not for it to set")
        for name in ("max_concurrency", "max_attempts", "tokens_per_image", "max_consecutive_failures"):
            if getattr(self, name) < 1:
                raise ValueError(f"expert.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("backoff_s", "request_timeout_s", "turn_timeout_s", "episode_timeout_s"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"expert.{name} is {value}; it must be finite and above 0")
        for name in (
            "requests_per_minute",
            "tokens_per_minute",
            "input_usd_per_mtok",
            "output_usd_per_mtok",
            "max_cost_usd",
        ):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"expert.{name} is {value}; it must be finite and not negative")
        if self.max_cost_usd and not self.input_usd_per_mtok + self.output_usd_per_mtok:
            raise ValueError(
                f"teacher.max_cost_usd is {self.max_cost_usd:g} and nothing has a price; "
                "set teacher.input_usd_per_mtok and teacher.output_usd_per_mtok"
            )


@dataclass
class FilterConfig:
    """Which episodes are kept.

    Attributes:
        min_pass_rate: Least share of a task's attempts that must be right.
        max_pass_rate: Largest such share; below 1 drops tasks that are too easy to teach anything.
        max_per_task: Most episodes kept of one task.
        require_format: Only well-formed transcripts are kept.
        require_zoom: Only episodes that zoomed are kept.
        held_out: Task files of evaluation sets; episodes on their videos or questions are dropped.
        max_ngram_overlap: Share of a question's word n-grams found in one of theirs from which it is theirs;
            0 compares no questions (where all of a kind are worded alike).
        ngram_size: Words in an n-gram.
        max_pattern_share: Largest share of kept episodes that one pattern may have.
        max_turns_share: Largest share that one number of turns may have.
    """

    min_pass_rate: float = 0.01
    max_pass_rate: float = 1.0
    max_per_task: int = 1
    require_format: bool = True
    require_zoom: bool = True
    held_out: list[str] = field(default_factory=list)
    max_ngram_overlap: float = 0.8
    ngram_size: int = 5
    max_pattern_share: float = 1.0
    max_turns_share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_pass_rate <= self.max_pass_rate <= 1:
            raise ValueError(
                f"filter.min_pass_rate is {self.min_pass_rate} and max_pass {self.max_pass_rate}; "
                "they must lie between 0 and 1, in order"
            )
        if not 0 <= self.max_ngram_overlap <= 1:
            raise ValueError(
                f"filter.max_ngram_overlap is {self.max_ngram_overlap}; it must lie between 0 and 1"
            )
        for name in ("max_pattern_share", "max_turns_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"curate.{name} is {getattr(self, name)}; it must be above 0 and at most 1")
        for name in ("max_per_task", "ngram_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"curate.{name} is {getattr(self, name)}; it must be at least 1")


@dataclass
class DistillRunConfig:
    """What both ways of distillation need."""

    name: str = "distill"
    """Directory of the run under `runs`."""
    runs: str = "runs"
    """Where run directories are made."""
    seed: int = 0
    """Draws which episodes are dropped for balance."""
    model: str = ""
    """Checkpoint directory of the policy that will learn: its tokenizer writes the episodes."""
    max_concurrent_episodes: int = 16
    """Episodes played side by side."""
    image_format: str = "png"
    """Files of kept frames; `png` keeps every bit."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """Who plays."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    """What is kept."""
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    """What an episode may do."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """How it is scored."""
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    """The decoders."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster that decodes."""
    monitoring: TrackingConfig = field(default_factory=TrackingConfig)
    """What is told of the run, and to whom."""

    def __post_init__(self) -> None:
        if not self.teacher.model:
            raise ValueError("expert.model is empty; set it, and expert.base_url, to who is to play")
        if not self.model:
            raise ValueError(
                "model is empty; it must be a checkpoint directory of the policy that will learn"
            )
        if self.max_concurrent_episodes < 1:
            raise ValueError(
                f"max_concurrent_episodes is {self.max_concurrent_episodes}; it must be at least 1"
            )
        if self.image_format not in IMAGE_FORMATS:
            raise ValueError(
                f"image_format is {self.image_format!r}; it must be one of {', '.join(IMAGE_FORMATS)}"
            )
        if self.reward.max_zoom_frames != self.episode.max_zoom_frames:
            raise ValueError(
                f"reward.max_zoom_frames is {self.reward.max_zoom_frames} and episode.max_zoom_frames "
                f"{self.episode.max_zoom_frames}; they must be equal, or good zooms would not be well formed"
            )


@dataclass
class ExemplarRunConfig(DistillRunConfig):
    """`vz-ray distill exemplar`: an expert plays tasks."""

    tasks: str = ""
    """Task file (RL schema)."""
    attempts_per_task: int = 4
    """Episodes played of each task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise ValueError("tasks is empty; it must be a task file")
        if self.attempts_per_task < 1:
            raise ValueError(f"attempts_per_task is {self.attempts_per_task}; it must be at least 1")


@dataclass
class ReflectionRunConfig(DistillRunConfig):
    """`vz-ray distill reflect`: an expert corrects the policy's own wrong episodes."""

    episodes: list[str] = field(default_factory=list)
    """Episode logs of the policy (`runs/x/episodes/*.jsonl`), or directories of such."""
    max_wrong_per_task: int = 2
    """Most wrong episodes of one task that are corrected."""
    prompt: str = "conf/prompt/reflect.yaml"
    """What the expert is told about the turn that it takes over."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.episodes:
            raise ValueError(
                "episodes is empty; it must list episode logs of the policy, or directories of them"
            )
        if self.max_wrong_per_task < 1:
            raise ValueError(f"max_wrong_per_task is {self.max_wrong_per_task}; it must be at least 1")
        if self.episode.max_rounds < 3:
            raise ValueError(
                f"episode.max_rounds is {self.episode.max_rounds}; zoom, correction and answer take 3"
            )
