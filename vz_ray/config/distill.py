"""Distillation: which expert plays, what it may cost, and which of its episodes are kept."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from vz_ray.config.clips import ClipsConfig
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.observe import WatchConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.config.run import RayConfig

IMAGES = ("jpeg", "png")


@dataclass
class ExpertConfig:
    """A model behind an OpenAI-compatible chat endpoint that plays episodes, and its limits.

    Attributes:
        model: Its name there.
        base_url: The endpoint, such as `http://expert:8000/v1`.
        api_key_env: Environment variable that holds the key; empty for a server that needs none.
        prompt: What it is told beyond the episode's own wording; see `conf/prompt/expert.yaml`.
        image: How frames are sent, `jpeg` or `png`.
        temperature: Its sampling temperature; several attempts at a task need some.
        top_p: Its nucleus mass.
        tokens_key: What the most tokens of a reply are called there; some hosted models want
            `max_completion_tokens`.
        parameters: Sent with every request; null leaves one out, also `temperature` and `top_p`.
        concurrency: Most requests in flight.
        attempts: Most requests for one turn; 429, 5xx, timeouts, lost connections and replies that are
            no completion are tried again.
        backoff_s: Wait before the second attempt, doubled with each further one; a server's
            `Retry-After` counts where it is longer.
        timeout_s: Seconds that one request may take.
        turn_s: Seconds that a turn may take: all its requests, and the waits between them.
        episode_s: Seconds that an episode may take; waiting for the limits below counts too.
        requests_per_minute: Most requests in any 60 s; 0 has no limit.
        tokens_per_minute: Most tokens in any 60 s, those of prompts included; 0 has no limit.
        image_tokens: Tokens that a frame takes at most, for estimates made before a request; they are
            raised where the server counts more.
        input_usd: Price of a million tokens of prompts.
        output_usd: Price of a million tokens of replies.
        limit_usd: Nothing is asked that could bring the cost above this; 0 has no limit.
        give_up_after: Episodes in a row that may fail because of the expert before the run stops.
    """

    model: str = ""
    base_url: str = ""
    api_key_env: str = ""
    prompt: str = "conf/prompt/expert.yaml"
    image: str = "jpeg"
    temperature: float = 1.0
    top_p: float = 1.0
    tokens_key: str = "max_tokens"
    parameters: dict[str, Any] = field(default_factory=lambda: {"stop": ["</video_zoom>"]})
    concurrency: int = 8
    attempts: int = 6
    backoff_s: float = 1.0
    timeout_s: float = 180.0
    turn_s: float = 900.0
    episode_s: float = 3600.0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    image_tokens: int = 300
    input_usd: float = 0.0
    output_usd: float = 0.0
    limit_usd: float = 0.0
    give_up_after: int = 8

    def __post_init__(self) -> None:
        if self.model and not re.match(r"https?://", self.base_url):
            raise ValueError(
                f"expert.base_url is {self.base_url!r}; with expert.model {self.model!r} it must be the "
                "endpoint's address, such as http://expert:8000/v1"
            )
        if self.image not in IMAGES:
            raise ValueError(f"expert.image is {self.image!r}; it must be one of {', '.join(IMAGES)}")
        taken = [
            name for name in ("model", "messages", "stream", "n", self.tokens_key) if name in self.parameters
        ]
        if taken:
            raise ValueError(f"expert.parameters has {taken[0]!r}, which is not for it to set")
        for name in ("concurrency", "attempts", "image_tokens", "give_up_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"expert.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("backoff_s", "timeout_s", "turn_s", "episode_s"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"expert.{name} is {value}; it must be finite and above 0")
        for name in ("requests_per_minute", "tokens_per_minute", "input_usd", "output_usd", "limit_usd"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"expert.{name} is {value}; it must be finite and not negative")
        if self.limit_usd and not self.input_usd + self.output_usd:
            raise ValueError(
                f"expert.limit_usd is {self.limit_usd:g} and nothing has a price; "
                "set expert.input_usd and expert.output_usd"
            )


@dataclass
class CurateConfig:
    """Which episodes are kept.

    Attributes:
        min_pass: Least share of a task's attempts that must be right.
        max_pass: Largest such share; below 1 drops tasks that are too easy to teach anything.
        per_task: Most episodes kept of one task.
        formatted: Only well-formed transcripts are kept.
        zoomed: Only episodes that zoomed are kept.
        against: Task files of evaluation sets; episodes on their videos or questions are dropped.
        overlap: Share of a question's word n-grams found in one of theirs from which it is theirs;
            0 compares no questions (where all of a kind are worded alike).
        ngram: Words in an n-gram.
        most_of_pattern: Largest share of kept episodes that one pattern may have.
        most_of_turns: Largest share that one number of turns may have.
    """

    min_pass: float = 0.01
    max_pass: float = 1.0
    per_task: int = 1
    formatted: bool = True
    zoomed: bool = True
    against: list[str] = field(default_factory=list)
    overlap: float = 0.8
    ngram: int = 5
    most_of_pattern: float = 1.0
    most_of_turns: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_pass <= self.max_pass <= 1:
            raise ValueError(
                f"curate.min_pass is {self.min_pass} and max_pass {self.max_pass}; "
                "they must lie between 0 and 1, in order"
            )
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"curate.overlap is {self.overlap}; it must lie between 0 and 1")
        for name in ("most_of_pattern", "most_of_turns"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"curate.{name} is {getattr(self, name)}; it must be above 0 and at most 1")
        for name in ("per_task", "ngram"):
            if getattr(self, name) < 1:
                raise ValueError(f"curate.{name} is {getattr(self, name)}; it must be at least 1")


@dataclass
class DistillConfig:
    """What both ways of distillation need."""

    name: str = "distill"
    """Directory of the run under `runs`."""
    runs: str = "runs"
    """Where run directories are made."""
    seed: int = 0
    """Draws which episodes are dropped for balance."""
    model: str = ""
    """Checkpoint directory of the policy that will learn: its tokenizer writes the episodes."""
    episodes_at_once: int = 16
    """Episodes played side by side."""
    image: str = "png"
    """Files of kept frames; `png` keeps every bit."""
    expert: ExpertConfig = field(default_factory=ExpertConfig)
    """Who plays."""
    curate: CurateConfig = field(default_factory=CurateConfig)
    """What is kept."""
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    """What an episode may do."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """How it is scored."""
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    """The decoders."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster that decodes."""
    observe: WatchConfig = field(default_factory=WatchConfig)
    """What is told of the run, and to whom."""

    def __post_init__(self) -> None:
        if not self.expert.model:
            raise ValueError("expert.model is empty; set it, and expert.base_url, to who is to play")
        if not self.model:
            raise ValueError(
                "model is empty; it must be a checkpoint directory of the policy that will learn"
            )
        if self.episodes_at_once < 1:
            raise ValueError(f"episodes_at_once is {self.episodes_at_once}; it must be at least 1")
        if self.image not in IMAGES:
            raise ValueError(f"image is {self.image!r}; it must be one of {', '.join(IMAGES)}")
        if self.reward.max_zoom_frames != self.episode.max_zoom_frames:
            raise ValueError(
                f"reward.max_zoom_frames is {self.reward.max_zoom_frames} and episode.max_zoom_frames "
                f"{self.episode.max_zoom_frames}; they must be equal, or good zooms would not be well formed"
            )


@dataclass
class ExemplarConfig(DistillConfig):
    """`vz-ray distill exemplar`: an expert plays tasks."""

    tasks: str = ""
    """Task file (RL schema)."""
    attempts: int = 4
    """Episodes played of each task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise ValueError("tasks is empty; it must be a task file")
        if self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}; it must be at least 1")


@dataclass
class ReflectConfig(DistillConfig):
    """`vz-ray distill reflect`: an expert corrects the policy's own wrong episodes."""

    episodes: list[str] = field(default_factory=list)
    """Episode logs of the policy (`runs/x/episodes/*.jsonl`), or directories of such."""
    wrong_per_task: int = 2
    """Most wrong episodes of one task that are corrected."""
    prompt: str = "conf/prompt/reflect.yaml"
    """What the expert is told about the turn that it takes over."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.episodes:
            raise ValueError(
                "episodes is empty; it must list episode logs of the policy, or directories of them"
            )
        if self.wrong_per_task < 1:
            raise ValueError(f"wrong_per_task is {self.wrong_per_task}; it must be at least 1")
        if self.episode.max_rounds < 3:
            raise ValueError(
                f"episode.max_rounds is {self.episode.max_rounds}; zoom, correction and answer take 3"
            )
