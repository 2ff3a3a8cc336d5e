"""All timeouts, in seconds. A timeout error names the component that it waits for.

A planned timeout is null by default. Before a run starts, `vz_ray.planning.timeouts` computes it from the config, the
model and the speed of the GPUs; it is never below its minimum, which also applies without a plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from vz_ray.config.fields import InvalidValueError, NumberRange, check_range, derived

_MINIMUM = "minimum_s"


def planned(minimum_s: float) -> Any:
    """Field of a timeout that the plan of the run derives if it is null; at least `minimum_s`."""
    return field(default=None, metadata={_MINIMUM: minimum_s})


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

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) is not None:
                check_range(self, item.name, NumberRange(above=0))


@dataclass
class TimeoutsConfig(CommonTimeouts):
    """Timeouts of training, evaluation and distillation. Null derives a value; `vz-ray plan` prints it."""

    engine_start_s: float | None = planned(600.0)
    """Start of one vLLM engine, including its placement; null derives it, at least 600."""
    turn_s: float | None = planned(300.0)
    """One generated turn; null derives it, at least 300."""
    episode_s: float | None = planned(1200.0)
    """One episode; null derives it, at least 1200."""
    no_workers_s: float = 3600.0
    """Time without any rollout worker, for example while every node is preempted. The run then stops; it can
    be resumed."""
    score_s: float = 300.0
    """Reward of one episode, including the judge."""
    judge_request_s: float = 30.0
    """One request to the judge."""
    judge_s: float = 120.0
    """One verdict of the judge, including its wait in the queue and all retries."""
    publish_s: float | None = planned(300.0)
    """Each phase of a weight publish, per worker; null derives it, at least 300."""
    learner_call_s: float | None = planned(3600.0)
    """One call to a learner actor, or the placement of all learner actors; null derives it, at least 3600."""
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
        turn_s = self.turn_s or minimum_timeout("turn_s")
        if self.score_s > 2 * turn_s:
            raise InvalidValueError(
                "score_s",
                f"is {self.score_s:g}; it must be at most twice turn_s ({turn_s:g}), or episodes time out "
                "during scoring",
                "turn_s",
            )


PLANNED_TIMEOUTS = {item.name: item.metadata[_MINIMUM] for item in fields(TimeoutsConfig) if _MINIMUM in item.metadata}
"""Minimum in seconds of each planned timeout."""


def minimum_timeout(key: str) -> float:
    """Return the minimum of a planned timeout in seconds."""
    return float(PLANNED_TIMEOUTS[key])


def timeout(key: str) -> Any:
    """Field that takes its value from the `timeouts` section; until a plan, a planned one has its minimum."""
    default = PLANNED_TIMEOUTS.get(key, getattr(TimeoutsConfig, key))
    return derived(default, f"timeouts.{key}")


@dataclass
class ServeTimeoutsConfig(CommonTimeouts):
    """Timeouts of a server. Clients rely on them, so that none is derived."""

    engine_start_s: float = 600.0
    """Start of one vLLM engine, including its placement."""
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
