"""Scalars over steps: one JSON line each, and TensorBoard events beside them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from vz_ray.monitoring.run_dir import write_atomic
from vz_ray.monitoring.trackers import Tracker


class MetricLogger:
    """Writes `metrics.jsonl` and TensorBoard events.

    A line is `{"step": 3, "time": 1790000000.0, "reward": 0.7}`. Values that are
    not finite are written as the strings "nan", "inf" and "-inf", so that every
    line stays JSON; `read_metrics` turns them back.

    Args:
        path: The JSON lines file; appended to.
        events: Directory of the TensorBoard events; none are written without it.
        resume_after: Last step that counts. Lines of later steps, left by a
            run that was stopped after its last checkpoint, are dropped.
        trackers: Are handed each row too.
    """

    def __init__(
        self,
        path: Path,
        tensorboard_dir: Path | None = None,
        resume_step: int | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.path, self._trackers = path, trackers
        _keep_until(path, resume_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the log is
        self._events = EventFileWriter(str(tensorboard_dir)) if tensorboard_dir else None
        if self._events and resume_step is not None:
            # TensorBoard forgets events from this step on, as we just did.
            start = SessionLog(status=SessionLog.START)
            self._events.add_event(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line; it is with the operating system when this returns."""
        now = time.time()
        row = {"step": step, "time": round(now, 3)} | {name: _plain(value) for name, value in values.items()}
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Every complete line, in order; an unfinished last line is left out.

    Raises:
        ValueError: A line other than the last is not a metrics line.
    """
    return [row for row, _ in _rows(path)]


def _rows(path: Path) -> list[tuple[dict[str, float], str]]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    rows = []
    for number, line in enumerate(complete.splitlines(keepends=True), 1):
        try:
            rows.append(({name: float(value) for name, value in json.loads(line).items()}, line))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}, is not a metrics line: {error}") from error
    return rows


def _keep_until(path: Path, step: int | None) -> None:
    """Drops lines after `step`, and a line that was cut off when a process died."""
    if not path.exists():
        return
    limit = math.inf if step is None else step
    kept = "".join(line for row, line in _rows(path) if row["step"] <= limit)
    if kept != path.read_text(encoding="utf-8"):
        write_atomic(path, kept.encode())


def _plain(value: float) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)
