"""View of a run, read from its directory only. Works from another process, pod or machine."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vz_ray.monitoring import metric_names
from vz_ray.monitoring.live_status import LiveStatus, RunKind, RunState
from vz_ray.monitoring.metric_logger import read_metrics
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.utils.errors import UserError

CURVES: dict[str, dict[str, str]] = {
    RunKind.RL: {
        "reward": metric_names.REWARD_TOTAL,
        "accuracy": metric_names.REWARD_ACCURACY,
        "zooms": metric_names.ZOOMS_PER_EPISODE,
        "mismatch KL": metric_names.MISMATCH_KL,
        "sync s": metric_names.WEIGHT_SYNC_SECONDS,
    },
    RunKind.SFT: {"loss": "loss", "grad norm": "grad_norm", "tokens/s": "tokens_per_second"},
    RunKind.DISTILL: {
        "correct": metric_names.TEACHER_CORRECT_RATE,
        "failed": metric_names.TEACHER_FAILED_RATE,
        "cost $": metric_names.TEACHER_COST_USD,
    },
}
"""Curves of each kind of run: title and key of the metrics file."""
MAX_WARNINGS = 5
_TAIL_BYTES = 256 * 1024
"""Size of the end of the log that is searched for warnings."""
_TEXT_WARNING = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\S* (WARNING|ERROR|CRITICAL) \S+ (\S+): (.*)$")


@dataclass(frozen=True, slots=True)
class RunView:
    """State of a run at one time.

    Attributes:
        path: Run directory.
        read_s: Time of the view, seconds since the epoch.
        state: State of the run; None without `live.json`.
        status: Content of `live.json`; None if it is missing.
        curves: Values of each curve of `CURVES`, in the order of the metric rows.
        warnings: Last warnings in the log, oldest first: time, level, logger and message.
    """

    path: Path
    read_s: float
    state: RunState | None
    status: LiveStatus | None
    curves: dict[str, list[float]]
    warnings: list[tuple[str, str, str, str]]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON value that `vz-ray top --json` prints."""
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
                dict(zip(("time", "level", "logger", "message"), warning, strict=True)) for warning in self.warnings
            ],
        }


def read_run_view(path: Path) -> RunView:
    """Read the view of a run.

    Raises:
        UserError: `path` is not a run directory, or one of its files is invalid. The message names the file.
    """
    if not path.is_dir():
        raise UserError(f"no run at {path}: directory not found; runs are in `runs/` of the working directory")
    run, now = RunDir.open(path), time.time()
    status = LiveStatus.read(run.live_status)
    try:
        rows = read_metrics(run.path / (status.metrics_file if status else run.metrics.name))
    except ValueError as error:
        raise UserError(f"{error}; repair the file, a resumed run reads it") from error
    keys = CURVES.get(status.run_kind if status else RunKind.RL, CURVES[RunKind.RL])
    curves = {name: [row[key] for row in rows if key in row] for name, key in keys.items()}
    state = None if status is None else status.state_at(now)
    return RunView(path, now, state, status, curves, recent_warnings(run.logs / "vz_ray.log"))


def recent_warnings(log: Path, max_warnings: int = MAX_WARNINGS) -> list[tuple[str, str, str, str]]:
    """Return the last warnings and errors of a text or JSON log, each with the first line of its message."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    warnings = [warning for line in lines if (warning := _parse_warning(line))]
    return warnings[-max_warnings:]


def _parse_warning(line: str) -> tuple[str, str, str, str] | None:
    if line.startswith("{"):
        try:
            record = json.loads(line)
            if record["level"] in ("WARNING", "ERROR", "CRITICAL"):
                message = str(record["message"]).split("\n")[0]
                return str(record["time"]), record["level"], str(record["logger"]), message
        except (ValueError, KeyError, TypeError):
            pass
        return None
    match = _TEXT_WARNING.match(line)
    return None if match is None else (match[1], match[2], match[3], match[4])
