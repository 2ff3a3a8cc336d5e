"""Config of rewards."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from vz_ray.config.fields import InvalidValueError, Section, choice, derived, number
from vz_ray.config.timeouts import timeout

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass
class EndpointConfig(Section):
    """A model behind an OpenAI-compatible chat endpoint."""

    model: str = ""
    """Model name at the endpoint."""
    base_url: str = ""
    """Endpoint, for example `http://host:8000/v1`."""
    api_key_env: str = ""
    """Environment variable with the API key, on the machines that send requests; empty sends no key."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Parameters of every request; null removes one."""
    max_concurrency: int = number(16, minimum=1)
    """Maximum concurrent requests per process."""
    max_attempts: int = number(6, minimum=1)
    """Maximum attempts at a request; 429, 5xx, timeouts and lost connections are retried, and a teacher's
    invalid replies."""
    backoff_s: float = number(1.0, above=0)
    """Wait before the first retry in seconds, doubled for each further one; a longer `Retry-After` is
    respected."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model and not re.match(r"https?://", self.base_url):
            raise InvalidValueError(
                "base_url",
                f"is {self.base_url!r}; with model {self.model!r} it must be the endpoint's address, for example "
                "http://host:8000/v1",
                "model",
            )
        reserved = [name for name in ("model", "messages", "stream", "n") if name in self.parameters]
        if reserved:
            raise InvalidValueError("parameters", f"has {reserved[0]!r}, which is reserved; remove it")


@dataclass
class JudgeConfig(EndpointConfig):
    """Judge model for open-ended answers; without `model`, answers that need a judge are invalid."""

    prompt: str = "conf/prompt/judge.yaml"
    """Prompt for open-ended answers, scored 0 or 1."""
    graded_prompt: str = "conf/prompt/judge-graded.yaml"
    """Prompt for graded answers, scored yes or no and 0 to 5."""
    caption_prompt: str = "conf/prompt/judge-caption.yaml"
    """Prompt for questions that are answered from a caption only."""
    parameters: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.0, "max_tokens": 512})
    """Parameters of every request; null removes one (some models use `max_completion_tokens` instead of
    `max_tokens`)."""
    request_timeout_s: float = timeout("judge_request_s")
    """Timeout of one request."""
    total_timeout_s: float = timeout("judge_s")
    """Timeout of one verdict, including its wait in the queue and all retries."""
    use_cache: bool = True
    """Cache verdicts on disk, shared by all processes and runs."""
    cache_dir: str = ""
    """Directory of the cache; default: the user's cache directory."""


@dataclass
class TurnRewardConfig(Section):
    """Rewards of single turns, for `learner.loss.turn_credit`; not part of the total reward."""

    valid_zoom: float = number(0.0, minimum=0)
    """Reward of a served zoom."""
    new_time: float = number(0.0, minimum=0)
    """Reward of a served zoom times the share of its segment that earlier zooms did not cover."""
    evidence: float = number(0.0, minimum=0)
    """Reward of a served zoom times the share of the task's evidence spans that it is the first zoom to show."""

    @property
    def enabled(self) -> bool:
        """Whether a weight is above 0."""
        return bool(self.valid_zoom or self.new_time or self.evidence)


@dataclass
class RewardConfig(Section):
    """Reward of an episode."""

    accuracy: float = number(0.9, minimum=0)
    """Weight of a correct answer (paper: 0.9)."""
    format: float = number(0.1, minimum=0)
    """Weight of a well-formed transcript (paper: 0.1)."""
    tool: float = number(0.5, minimum=0)
    """Bonus for a correct answer after a served zoom (paper: 0.5)."""
    scorer: str = choice("clean", "compat")
    """`clean` parses the usual ways to name an option in the answer and counts served zooms; `compat` scores
    like the released VideoZoomer code and counts attempted zooms."""
    max_zoom_frames: int = derived(16, "episode.max_zoom_frames")
    """Maximum frames of one well-formed zoom (paper: 16)."""
    number_rel_tol: float = number(0.01, minimum=0)
    """Relative tolerance of non-integer numeric answers; integers must be equal."""
    length_penalty: float = number(0.0, minimum=0)
    """Weight of the length penalty; 0 disables it."""
    length_free_tokens: int = 2048
    """Generated tokens of an episode without penalty."""
    length_full_tokens: int = number(4096, minimum=1)
    """Generated tokens with the full penalty; it grows linearly in between."""
    frame_cost: float = number(0.0, minimum=0)
    """Weight of the cost of zoomed frames; 0 disables it."""
    frame_cost_full_frames: int = number(64, minimum=1)
    """Zoomed frames with the full cost."""
    function: str = ""
    """User reward function `package.module:name`; see `vz_ray/rewards/user_function.py`."""
    turns: TurnRewardConfig = field(default_factory=TurnRewardConfig)
    """Rewards of single turns."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Judge model for open-ended answers."""
    timeout_s: float = timeout("score_s")
    """Timeout of scoring one episode."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.length_free_tokens < self.length_full_tokens:
            raise InvalidValueError(
                "length_free_tokens",
                f"is {self.length_free_tokens}; it must be at least 0 and below length_full_tokens "
                f"({self.length_full_tokens})",
                "length_full_tokens",
            )
        if self.function and not _DOTTED.fullmatch(self.function):
            raise InvalidValueError("function", f"is {self.function!r}; write it as package.module:name")
