"""`live.json`: current state of a run, rewritten at each heartbeat."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.errors import UserError

MAX_MISSED_HEARTBEATS = 6
"""A status is stale after this many heartbeat intervals, but not before `MIN_STALE_S`."""
MIN_STALE_S = 30.0


class RunKind(StrEnum):
    """What a run does."""

    RL = "rl"
    SFT = "sft"
    DISTILL = "distill"

    @property
    def unit(self) -> str:
        """Counted unit: a training step, or an episode of the teacher."""
        return "episode" if self is RunKind.DISTILL else "step"


class RunState(StrEnum):
    """State of a run."""

    RUNNING = "running"
    ENDED = "ended"
    """All steps are complete."""
    STOPPED = "stopped"
    """Stopped on request; the run can be resumed."""
    FAILED = "failed"
    """Ended with an error."""
    STALE = "stale"
    """Running according to `live.json`, but the heartbeat is overdue: killed, or disconnected."""


@dataclass
class LiveStatus:
    """Snapshot of a run. Times are seconds since the epoch.

    Attributes:
        run: Name of the run.
        host, pid: Machine and process of the driver.
        written_s: Time of this snapshot.
        heartbeat_interval_s: Interval between snapshots.
        state: `running`, `ended`, `stopped` or `failed`.
        error: Error of a failed run.
        phase: `start`, `rollout`, `learn`, `publish`, `evaluate`, `checkpoint` or `export`.
        phase_started_s: Start of the phase.
        run_kind: A `RunKind`.
        metrics_file: Name of the metrics file in the run directory.
        step, max_steps: Completed and maximum steps. `max_steps` is 0 if a time limit ends the run.
        last_step_s: End of the last step, or start of the run.
        eta_s: Estimated seconds until the end; None if unknown.
        checkpoint: `at_s`, `seconds` and `step` of the last checkpoint; empty before the first.
        rollout: `workers` (count by state), `worker_statuses`, `running`, `queued`, `lost`,
            `tokens_per_second`, `episodes_per_second`. Empty without rollout workers.
        decode: `decoders`, `unresponsive`, `in_flight`, `waiting`, `hit_ratio`, `wait_p50_s`, `wait_p95_s`,
            `failures`, `quarantined`.
        driver_memory_bytes: Resident memory of the driver.
        prometheus_targets: `host:port` of the metrics agent of each node.
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
    run_kind: str = RunKind.RL.value
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
        """Set `written_s` to now and replace the file atomically."""
        self.written_s = round(time.time(), 3)
        write_atomic(path, json.dumps(asdict(self), default=str).encode())

    @classmethod
    def read(cls, path: Path) -> LiveStatus | None:
        """Read a status; return None if the file is missing. Unknown fields are ignored.

        Raises:
            UserError: The file is invalid.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            names = {f.name for f in fields(cls)}
            return cls(**{name: value for name, value in values.items() if name in names})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"cannot read {path} ({error}); delete it, a resumed run rewrites it") from error

    def age_s(self, now_s: float) -> float:
        """Return the age of the snapshot, at least 0 if the clocks of two machines differ."""
        return max(0.0, now_s - self.written_s)

    def state_at(self, now_s: float) -> RunState:
        """Return the state, or `STALE` if the run should have written a newer snapshot."""
        max_age_s = max(MIN_STALE_S, MAX_MISSED_HEARTBEATS * self.heartbeat_interval_s)
        if self.state == RunState.RUNNING and self.age_s(now_s) > max_age_s:
            return RunState.STALE
        return RunState(self.state)
