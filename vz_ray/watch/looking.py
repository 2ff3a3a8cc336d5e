"""What there is to see of a run, read from its directory alone: from another process, pod or machine."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vz_ray.observe import names
from vz_ray.observe.errors import UserError
from vz_ray.observe.live import EPISODE, ITERATION, STEP, Live, State
from vz_ray.observe.metrics import read_metrics
from vz_ray.observe.run_dir import RunDir

CURVES = {
    "reward": names.REWARD_TOTAL,
    "accuracy": names.REWARD_ACCURACY,
    "zooms": names.ZOOMS_MEAN,
    "mismatch KL": names.MISMATCH_KL,
    "sync s": names.SYNC_S,
}
"""What the screen draws of reinforcement learning, and which key of `metrics.jsonl` it is."""
CURVES_OF = {
    ITERATION: CURVES,
    STEP: {"loss": "loss", "grad norm": "grad_norm", "tokens/s": "tokens_per_s"},
    EPISODE: {"right": names.EXPERT_RIGHT, "failed": names.EXPERT_FAILED, "cost $": names.EXPERT_USD},
}
"""By what a run counts."""
WARNINGS = 5
_TAIL = 256 * 1024
"""Bytes at the end of the log that are looked through for warnings."""
_TEXT = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\S* (WARNING|ERROR|CRITICAL) \S+ (\S+): (.*)$")


@dataclass(frozen=True, slots=True)
class View:
    """A run at one moment.

    Attributes:
        path: Its directory.
        at_s: When it was looked at, seconds since the epoch.
        state: How it stands with it; None for a run that has no `live.json`.
        live: Its own account.
        curves: Values of each of `CURVES_OF` what it counts, in the order of its rows of metrics.
        warnings: The last ones of its log, oldest first: time, level, who, and what.
    """

    path: Path
    at_s: float
    state: State | None
    live: Live | None
    curves: dict[str, list[float]]
    warnings: list[tuple[str, str, str, str]]

    def to_dict(self) -> dict[str, Any]:
        """As `vz-ray top --json` prints it."""
        age = None if self.live is None else round(self.live.age_s(self.at_s), 1)
        return {
            "run": str(self.path),
            "state": None if self.state is None else self.state.value,
            "age_s": age,
            "live": None if self.live is None else asdict(self.live),
            "curves": {
                name: [value if math.isfinite(value) else None for value in values]
                for name, values in self.curves.items()
            },
            "warnings": [
                dict(zip(("time", "level", "logger", "message"), w, strict=True)) for w in self.warnings
            ],
        }


def look(path: Path) -> View:
    """Looks at a run once.

    Raises:
        UserError: There is no run at `path`, or a file of it is broken; the message names it.
    """
    if not path.is_dir():
        raise UserError(
            f"no run at {path}: there is no such directory; runs are in `runs/` where they were started"
        )
    run, now = RunDir.open(path), time.time()
    live = Live.read(run.live)
    try:
        rows = read_metrics(run.path / (live.rows if live else run.metrics.name))
    except ValueError as error:
        raise UserError(f"{error}; a run that goes on from its checkpoint needs it whole") from error
    drawn = CURVES_OF.get(live.unit if live else ITERATION, CURVES)
    curves = {name: [row[key] for row in rows if key in row] for name, key in drawn.items()}
    state = None if live is None else live.standing(now)
    return View(path, now, state, live, curves, warnings_of(run.logs / "vz_ray.log"))


def warnings_of(log: Path, most: int = WARNINGS) -> list[tuple[str, str, str, str]]:
    """The last warnings and errors of a log of either format; of text, the first line of each."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    found = [warning for line in lines if (warning := _warning(line))]
    return found[-most:]


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
