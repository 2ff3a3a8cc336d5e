"""All timeouts, in seconds. A timeout error names the component that it waits for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vz_ray.config.fields import InvalidValueError, NumberRange, check_range, derived


@dataclass
class CommonTimeouts:
    """Timeouts of training, evaluation and serving."""

    ray_start_s: float = 120.0
    """Starting a private Ray cluster, or joining an existing one."""
    decode_s: float = 60.0
    """One attempt of a decoder at a clip, including its wait in the decoder's queue."""
    decode_queue_s: float = 600.0
    """Wait for the limit on bytes in flight, or behind quarantined videos."""
    download_s: float = 600.0
    """Download of one video file."""
    select_frames_s: float = 120.0
    """Choice of an overview's frames by the image-text model."""
    engine_start_s: float = 600.0
    """Start of one vLLM engine, including its placement."""
    turn_s: float = 300.0
    """One generated turn."""
    episode_s: float = 1200.0
    """One episode."""

    def __post_init__(self) -> None:
        for item in fields(self):
            check_range(self, item.name, NumberRange(above=0))


@dataclass
class TimeoutsConfig(CommonTimeouts):
    """Timeouts of training, evaluation and distillation."""

    no_workers_s: float = 3600.0
    """Time without any rollout worker, for example while every node is preempted. The run then stops; it can
    be resumed."""
    score_s: float = 300.0
    """Reward of one episode, including the judge."""
    judge_request_s: float = 30.0
    """One request to the judge."""
    judge_s: float = 120.0
    """One verdict of the judge, including its wait in the queue and all retries."""
    publish_s: float = 300.0
    """Each phase of a weight publish, per worker."""
    learner_call_s: float = 3600.0
    """One call to a learner actor, or the placement of all learner actors."""
    report_frames_s: float = 120.0
    """Decoding the frames of one episode for the report; on timeout the report shows no frames."""
    teacher_request_s: float = 180.0
    """One request to the teacher."""
    teacher_turn_s: float = 900.0
    """One turn of the teacher, including all retries."""
    teacher_episode_s: float = 3600.0
    """One episode of the teacher, including its waits for rate limits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_s <= self.judge_s:
            raise InvalidValueError(
                "score_s", f"is {self.score_s:g}; it must be above judge_s ({self.judge_s:g})", "judge_s"
            )
        if self.score_s > 2 * self.turn_s:
            raise InvalidValueError(
                "score_s",
                f"is {self.score_s:g}; it must be at most twice turn_s ({self.turn_s:g}), or episodes time out "
                "during scoring",
                "turn_s",
            )


def timeout(key: str) -> Any:
    """Field that takes its value from the `timeouts` section."""
    return derived(getattr(TimeoutsConfig, key), f"timeouts.{key}")


@dataclass
class ServeTimeoutsConfig(CommonTimeouts):
    """Timeouts of a server."""

    turn_s: float = 120.0
    """One generated turn."""
    episode_s: float = 600.0
    """One request, from the overview to the answer."""
    drain_s: float = 120.0
    """Wait of a weight update for ongoing requests; requests that take longer finish with the new weights."""
    json_body_s: float = 60.0
    """Receiving the body of a JSON request."""
    upload_s: float = 3600.0
    """Receiving an upload."""
