"""Configuration of rewards."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

SCORERS = ("clean", "compat")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass
class JudgeConfig:
    """The model that judges answers which only a reader can compare, behind an OpenAI-compatible endpoint.

    Attributes:
        model: Its name there; empty is no judge, and answers that need one are invalid.
        base_url: The endpoint, such as `http://judge:8000/v1`.
        api_key_env: Environment variable of the rollout workers that holds the key; empty for a
            server that needs none.
        prompt: Wording for open-ended answers, judged 0 or 1.
        graded_prompt: Wording for graded answers, judged yes or no and 0 to 5.
        caption_prompt: Wording for questions that are answered from a caption alone.
        parameters: Sent with every request; null leaves one out (some hosted models want
            `max_completion_tokens` in place of `max_tokens`).
        max_concurrency: Most requests in flight from one rollout worker.
        max_attempts: Most requests for one verdict; 429, 5xx, timeouts and lost connections are tried again.
        backoff_s: Wait before the second attempt, doubled with each further one; a server's
            `Retry-After` counts where it is longer.
        request_timeout_s: Seconds that one request may take.
        total_timeout_s: Seconds that a verdict may take, waiting for its turn and all attempts included.
        use_cache: Keep verdicts on disk, for all processes and runs.
        cache_dir: Where; empty takes the user's cache directory.
    """

    model: str = ""
    base_url: str = ""
    api_key_env: str = ""
    prompt: str = "conf/prompt/judge.yaml"
    graded_prompt: str = "conf/prompt/judge-graded.yaml"
    caption_prompt: str = "conf/prompt/judge-caption.yaml"
    parameters: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.0, "max_tokens": 512})
    max_concurrency: int = 16
    max_attempts: int = 6
    backoff_s: float = 1.0
    request_timeout_s: float = 30.0
    total_timeout_s: float = 120.0
    use_cache: bool = True
    cache_dir: str = ""

    def __post_init__(self) -> None:
        if self.model and not re.match(r"https?://", self.base_url):
            raise ValueError(
                f"reward.judge.base_url is {self.base_url!r}; with reward.judge.model {self.model!r} it must "
                "be the endpoint's address, such as http://judge:8000/v1"
            )
        taken = [name for name in ("model", "messages", "stream", "n") if name in self.parameters]
        if taken:
            raise ValueError(f"reward.judge.parameters has {taken[0]!r}, which is not for it to set")
        for name in ("max_concurrency", "max_attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"reward.judge.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("backoff_s", "request_timeout_s", "total_timeout_s"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"reward.judge.{name} is {value}; it must be finite and above 0")


@dataclass
class RewardConfig:
    """How an episode is scored.

    Attributes:
        accuracy: Weight of a right answer (paper: 0.9).
        format: Weight of a well-formed transcript (paper: 0.1).
        tool: Paid on top when the answer is right and a zoom was carried out (paper: 0.5).
        scorer: `clean` reads the usual ways to name an option inside the
            answer span and counts zooms carried out; `compat` scores as the
            released VideoZoomer code does and counts attempted zooms.
        max_zoom_frames: Frames that one well-formed zoom may ask for (paper: 16).
        number_rel_tol: Relative tolerance for ground truths that are not
            integers; integers must be equal.
        length_penalty: Weight of the penalty for saying much; 0 has none.
        length_free_tokens: Tokens that a policy may say in an episode without penalty.
        length_full_tokens: Tokens at which the penalty is whole; it grows evenly in between.
        frame_cost: Weight of the cost of frames that zooms showed; 0 has none.
        frame_cost_full_frames: Frames at which that cost is whole.
        function: A reward of your own, `package.module:name`; see `vz_ray/rewards/user_function.py`.
        judge: Who judges open-ended answers.
        timeout_s: Seconds in which an episode must have been scored.
    """

    accuracy: float = 0.9
    format: float = 0.1
    tool: float = 0.5
    scorer: str = "clean"
    max_zoom_frames: int = 16
    number_rel_tol: float = 0.01
    length_penalty: float = 0.0
    length_free_tokens: int = 2048
    length_full_tokens: int = 4096
    frame_cost: float = 0.0
    frame_cost_full_frames: int = 64
    function: str = ""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("accuracy", "format", "tool", "number_rel_tol", "length_penalty", "frame_cost"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"reward.{name} is {value}; it must be finite and not negative")
        if self.scorer not in SCORERS:
            raise ValueError(f"reward.scorer is {self.scorer!r}; choose one of {', '.join(SCORERS)}")
        for name in ("max_zoom_frames", "frame_cost_full_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"reward.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.length_free_tokens < self.length_full_tokens:
            raise ValueError(
                f"reward.length_free_tokens is {self.length_free_tokens}; "
                f"it must lie between 0 and reward.length_full_tokens ({self.length_full_tokens})"
            )
        if self.function and not _DOTTED.fullmatch(self.function):
            raise ValueError(f"reward.function is {self.function!r}; write it as package.module:name")
        if self.timeout_s <= self.judge.total_timeout_s:
            raise ValueError(
                f"reward.timeout_s is {self.timeout_s:g}; "
                f"it must be above reward.judge.total_timeout_s ({self.judge.total_timeout_s:g})"
            )
