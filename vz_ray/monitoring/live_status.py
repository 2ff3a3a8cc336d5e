"""`live.json`: what a run is doing at this moment, for whoever looks into its directory."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from vz_ray.monitoring.run_dir import write_atomic
from vz_ray.utils.errors import UserError

MAX_MISSED_HEARTBEATS = 6
"""A heartbeat is late after as many of its intervals, and never before `MIN_STALE_S`."""
MIN_STALE_S = 30.0
RL_RUN, SFT_RUN, DISTILL_RUN = "iteration", "step", "episode"
"""What runs count: of reinforcement learning, of supervised training, of distillation."""


class RunState(StrEnum):
    """How it stands with a run."""

    RUNNING = "running"
    ENDED = "ended"
    """All its iterations are done."""
    STOPPED = "stopped"
    """Someone asked it to stop; it can go on."""
    FAILED = "failed"
    """It ended with an error."""
    STALE = "silent"
    """It says that it runs, and has not said so for too long: killed, or cut off."""


@dataclass
class LiveStatus:
    """One look at a run. Times are seconds since the epoch.

    Attributes:
        run: Its name.
        host, pid: Where the driver is.
        written_s: When this was written.
        heartbeat_interval_s: How often it is.
        state: `running`, `ended`, `stopped` or `failed`.
        error: What ended it, where it failed.
        phase: `start`, `rollout`, `learn`, `publish`, `evaluate`, `checkpoint` or `export`.
        phase_started_s: When that began.
        run_kind: What it counts: `step`, `step` of supervised training, or `episode` of distillation.
        metrics_file: File of its metrics in the run directory.
        step, iterations: Of these done, and to be done; 0 to be done where time is what ends it.
        last_step_s: When the last iteration ended, or the run began.
        eta_s: Seconds to the end at the pace so far; None where nobody can say.
        checkpoint: `at_s`, `seconds` and `step` of the last one; empty before the first.
        rollout: Empty where there are no rollout workers; else `workers` by state, `seats`, `playing`,
            `waiting`, `lost`, `tokens_per_s`, `episodes_per_s`.
        decode: `decoders`, `silent`, `in_flight`, `waiting`, `hit_ratio`, `wait_p50_s`, `wait_p95_s`,
            `failures`, `quarantined`.
        driver_memory_bytes: Resident memory of the driver.
        prometheus_targets: Addresses at which Prometheus finds the nodes' metrics.
    """

    run: str = ""
    host: str = ""
    pid: int = 0
    written_s: float = 0.0
    heartbeat_interval_s: float = 5.0
    state: str = RunState.RUNNING.value
    error: str = ""
    phase: str = "start"
    phase_started_s: float = 0.0
    run_kind: str = RL_RUN
    metrics_file: str = "metrics.jsonl"
    step: int = 0
    max_steps: int = 0
    last_step_s: float = 0.0
    eta_s: float | None = None
    checkpoint: dict[str, float] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)
    decode: dict[str, Any] = field(default_factory=dict)
    driver_memory_bytes: float = 0.0
    prometheus_targets: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Whole or not at all; `written_s` becomes now."""
        self.written_s = round(time.time(), 3)
        write_atomic(path, json.dumps(asdict(self), default=str).encode())

    @classmethod
    def read(cls, path: Path) -> LiveStatus | None:
        """None where there is none: the run has not got that far, or was made before there were any.

        Raises:
            UserError: It is not one.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            known = {f.name for f in fields(cls)}
            return cls(**{name: value for name, value in found.items() if name in known})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} cannot be read ({error}): delete it, a run that goes on writes it anew"
            ) from error

    def age_s(self, now_s: float) -> float:
        """Since it was written; 0 where clocks of machines differ the other way."""
        return max(0.0, now_s - self.written_s)

    def state_at(self, now_s: float) -> RunState:
        """Its state, as far as its age lets one believe it."""
        if self.state == RunState.RUNNING and self.age_s(now_s) > max(
            MIN_STALE_S, MAX_MISSED_HEARTBEATS * self.heartbeat_interval_s
        ):
            return RunState.STALE
        return RunState(self.state)
