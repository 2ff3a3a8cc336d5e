"""What there is to see of a run, read from its directory alone: from another process, pod or machine."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vz_ray.monitoring import metric_names
from vz_ray.monitoring.live_status import DISTILL_RUN, RL_RUN, SFT_RUN, LiveStatus, RunState
from vz_ray.monitoring.metric_logger import read_metrics
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.utils.errors import UserError

RL_CURVES = {
    "reward": metric_names.REWARD_TOTAL,
    "accuracy": metric_names.REWARD_ACCURACY,
    "zooms": metric_names.ZOOMS_PER_EPISODE,
    "mismatch KL": metric_names.MISMATCH_KL,
    "sync s": metric_names.WEIGHT_SYNC_SECONDS,
}
"""What the screen draws of reinforcement learning, and which key of `metrics.jsonl` it is."""
CURVES_BY_RUN_KIND = {
    RL_RUN: RL_CURVES,
    SFT_RUN: {"loss": "loss", "grad norm": "grad_norm", "tokens/s": "tokens_per_second"},
    DISTILL_RUN: {
        "right": metric_names.TEACHER_CORRECT_RATE,
        "failed": metric_names.TEACHER_FAILED_RATE,
        "cost $": metric_names.TEACHER_COST_USD,
    },
}
"""By what a run counts."""
MAX_WARNINGS = 5
_TAIL = 256 * 1024
"""Bytes at the end of the log that are looked through for warnings."""
_TEXT = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\S* (WARNING|ERROR|CRITICAL) \S+ (\S+): (.*)$")


@dataclass(frozen=True, slots=True)
class RunView:
    """A run at one moment.

    Attributes:
        path: Its directory.
        read_s: When it was looked at, seconds since the epoch.
        state: How it stands with it; None for a run that has no `status.json`.
        status: Its own account.
        curves: Values of each of `CURVES_BY_RUN_KIND` what it counts, in the order of its rows of metrics.
        warnings: The last ones of its log, oldest first: time, level, who, and what.
    """

    path: Path
    read_s: float
    state: RunState | None
    status: LiveStatus | None
    curves: dict[str, list[float]]
    warnings: list[tuple[str, str, str, str]]

    def to_dict(self) -> dict[str, Any]:
        """As `vz-ray top --json` prints it."""
        age = None if self.status is None else round(self.status.age_s(self.read_s), 1)
        return {
            "run": str(self.path),
            "state": None if self.state is None else self.state.value,
            "age_s": age,
            "status": None if self.status is None else asdict(self.status),
            "curves": {
                name: [value if math.isfinite(value) else None for value in values]
                for name, values in self.curves.items()
            },
            "warnings": [
                dict(zip(("time", "level", "logger", "message"), w, strict=True)) for w in self.warnings
            ],
        }


def read_run_view(path: Path) -> RunView:
    """Looks at a run once.

    Raises:
        UserError: There is no run at `path`, or a file of it is broken; the message names it.
    """
    if not path.is_dir():
        raise UserError(
            f"no run at {path}: there is no such directory; runs are in `runs/` where they were started"
        )
    run, now = RunDir.open(path), time.time()
    live = LiveStatus.read(run.live_status)
    try:
        rows = read_metrics(run.path / (live.metrics_file if live else run.metrics.name))
    except ValueError as error:
        raise UserError(f"{error}; a run that goes on from its checkpoint needs it whole") from error
    drawn = CURVES_BY_RUN_KIND.get(live.run_kind if live else RL_RUN, RL_CURVES)
    curves = {name: [row[key] for row in rows if key in row] for name, key in drawn.items()}
    state = None if live is None else live.state_at(now)
    return RunView(path, now, state, live, curves, recent_warnings(run.logs / "vz_ray.log"))


def recent_warnings(log: Path, max_warnings: int = MAX_WARNINGS) -> list[tuple[str, str, str, str]]:
    """The last warnings and errors of a log of either format; of text, the first line of each."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    found = [warning for line in lines if (warning := _warning(line))]
    return found[-max_warnings:]


def _warning(line: str) -> tuple[str, str, str, str] | None:
    if line.startswith("{"):
        try:
            record = json.loads(line)
            if record["level"] in ("WARNING", "ERROR", "CRITICAL"):
                said = str(record["message"]).split("\n")[0]
                return str(record["time"]), record["level"], str(record["logger"]), said
        except (ValueError, KeyError, TypeError):
            pass
        return None
    match = _TEXT.match(line)
    return None if match is None else (match[1], match[2], match[3], match[4])
