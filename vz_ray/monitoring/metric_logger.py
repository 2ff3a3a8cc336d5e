"""Metrics by step: JSON lines, TensorBoard events and experiment trackers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from vz_ray.monitoring.trackers import Tracker
from vz_ray.utils.atomic_files import write_atomic


class MetricLogger:
    """Writes `metrics.jsonl`, TensorBoard events and tracker rows.

    A row is `{"step": 3, "time": 1790000000.0, "reward/total": 0.7}`. Non-finite values are written as the
    strings "nan", "inf" and "-inf", so every line is valid JSON; `read_metrics` converts them back.

    Args:
        path: JSON Lines file to append to.
        tensorboard_dir: Directory of the TensorBoard events. None disables them.
        resume_step: Last step to keep. Rows of later steps, written after the last checkpoint, are removed.
        trackers: Experiment trackers that receive each row.
    """

    def __init__(
        self,
        path: Path,
        tensorboard_dir: Path | None = None,
        resume_step: int | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.path, self._trackers = path, trackers
        _truncate(path, resume_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._events = EventFileWriter(str(tensorboard_dir)) if tensorboard_dir else None
        if self._events and resume_step is not None:
            # TensorBoard discards earlier events from this step on.
            start = SessionLog(status=SessionLog.START)
            self._events.add_event(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row and flush it to the operating system."""
        now = time.time()
        row = {"step": step, "time": round(now, 3)} | {name: _json_value(value) for name, value in values.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._events:
            scalars = [Summary.Value(tag=name, simple_value=float(v)) for name, v in values.items()]
            self._events.add_event(Event(wall_time=now, step=step, summary=Summary(value=scalars)))
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        self._file.close()
        if self._events:
            self._events.close()

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return all complete rows in order; skip an unterminated last line.

    Raises:
        ValueError: A complete line is not a metrics row.
    """
    return [row for row, _ in _read_rows(path)]


def _read_rows(path: Path) -> list[tuple[dict[str, float], str]]:
    """Return each row with its line."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    rows = []
    for number, line in enumerate(complete.splitlines(keepends=True), 1):
        try:
            rows.append(({name: float(value) for name, value in json.loads(line).items()}, line))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a metrics row ({error})") from error
    return rows


def _truncate(path: Path, last_step: int | None) -> None:
    """Remove the rows after `last_step`, and an unterminated last line."""
    if not path.exists():
        return
    limit = math.inf if last_step is None else last_step
    kept = "".join(line for row, line in _read_rows(path) if row["step"] <= limit)
    if kept != path.read_text(encoding="utf-8"):
        write_atomic(path, kept.encode())


def _json_value(value: float) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)
