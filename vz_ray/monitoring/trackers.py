"""Optional experiment trackers: Weights & Biases and MLflow.

A tracker's package is imported only if the tracker is configured. Each tracker has a background thread, so a
slow server does not delay the run. `trackers.json` in the run directory stores the ids of the tracker runs,
which a resumed run reopens.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import math
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vz_ray.monitoring.background_sink import BackgroundSink
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.errors import UserError

T = TypeVar("T")

MAX_PENDING_ROWS = 1000
"""Maximum number of rows in the queue of a tracker."""
CLOSE_TIMEOUT_S = 20.0
"""Maximum time for pending rows at the end of a run."""
START_TIMEOUT_S = 60.0
"""Timeout for creating or reopening a tracker run."""

MetricRow = tuple[int, float, dict[str, float]]
"""Step, seconds since the epoch, values."""


class TrackerRun(Protocol):
    """An open run on a tracking server."""

    def log(self, row: MetricRow) -> None: ...

    def finish(self) -> None: ...


class Tracker:
    """Sends rows to a tracker run from a background thread."""

    def __init__(self, name: str, run: TrackerRun) -> None:
        self.name, self._run = name, run
        self._sink = BackgroundSink[MetricRow](name, run.log, MAX_PENDING_ROWS)

    @property
    def dropped(self) -> int:
        """Number of dropped rows."""
        return self._sink.dropped

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Enqueue a row. Non-finite values are omitted because servers reject them."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._sink.put((step, time.time(), finite))

    def close(self) -> None:
        """Send pending rows for at most `CLOSE_TIMEOUT_S`, then finish the tracker run."""
        self._sink.close(CLOSE_TIMEOUT_S)
        with suppress(Exception):
            _call_with_timeout(self._run.finish, CLOSE_TIMEOUT_S)


class _MlflowRun:
    """MLflow run. Every client call names the run, so no global state is set."""

    def __init__(self, uri: str, run_dir: RunDir, run_ids: dict[str, str], run_config: Mapping[str, str]) -> None:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self._client, self._metric = MlflowClient(tracking_uri=uri), Metric
        if "mlflow" in run_ids:
            self._client.get_run(run_ids["mlflow"])
            self._client.update_run(run_ids["mlflow"], status="RUNNING")
        else:
            existing = self._client.get_experiment_by_name("vz_ray")
            experiment_id = existing.experiment_id if existing else self._client.create_experiment("vz_ray")
            tags = {"vz_ray.run": str(run_dir.path)}
            created = self._client.create_run(experiment_id, run_name=run_dir.name, tags=tags)
            run_ids["mlflow"] = created.info.run_id
            for name, value in run_config.items():
                self._client.log_param(run_ids["mlflow"], name, value)
        self._run_id = run_ids["mlflow"]

    def log(self, row: MetricRow) -> None:
        step, time_s, values = row
        metrics = [self._metric(name, value, int(time_s * 1000), step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def finish(self) -> None:
        self._client.set_terminated(self._run_id)


class _WandbRun:
    """Weights & Biases run with its own `step` axis, because a resumed run may repeat steps."""

    def __init__(self, project: str, run_dir: RunDir, run_ids: dict[str, str], run_config: Mapping[str, str]) -> None:
        import wandb

        run_ids.setdefault("wandb", uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            id=run_ids["wandb"],
            resume="allow",
            dir=str(run_dir.logs),
            config=dict(run_config),
            settings=wandb.Settings(console="off", silent=True, init_timeout=START_TIMEOUT_S),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, row: MetricRow) -> None:
        step, _, values = row
        self._run.log({"step": step, **values})

    def finish(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, tuple[str, Callable[[str, RunDir, dict[str, str], Mapping[str, str]], TrackerRun]]] = {
    "wandb_project": ("wandb", _WandbRun),
    "mlflow_tracking_uri": ("mlflow", _MlflowRun),
}
"""Config key of each tracker, the package that it needs, and its run class."""


def check_trackers_installed(configured: Mapping[str, str]) -> None:
    """Raise `UserError` if the package of a configured tracker is missing. Imports nothing.

    Args:
        configured: Values of `wandb_project` and `mlflow_tracking_uri`; an empty value disables the tracker.
    """
    for key, value in configured.items():
        package, _ = _TRACKERS[key]
        if value and importlib.util.find_spec(package) is None:
            raise UserError(
                f"monitoring.{key} is {value!r}, but {package} is not installed; pip install {package}, or "
                "leave the key empty"
            )


def open_trackers(configured: Mapping[str, str], run_dir: RunDir, run_config: Mapping[str, str]) -> list[Tracker]:
    """Create or reopen the run of each configured tracker.

    Args:
        configured: As for `check_trackers_installed`.
        run_config: Flat configuration, stored with a new tracker run.

    Raises:
        UserError: A tracker cannot be opened. The message names its key.
    """
    check_trackers_installed(configured)
    path = run_dir.path / "trackers.json"
    run_ids: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    trackers = []
    for key, value in configured.items():
        if not value:
            continue
        package, run_type = _TRACKERS[key]
        try:
            open_run = partial(run_type, value, run_dir, run_ids, run_config)
            tracker_run = _call_with_timeout(open_run, START_TIMEOUT_S)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"monitoring.{key} is {value!r}, but its run could not be opened: {reason}; check the address "
                "and your login, or leave the key empty"
            ) from error
        trackers.append(Tracker(package, tracker_run))
        write_atomic(path, json.dumps(run_ids).encode())
    return trackers


def _call_with_timeout(call: Callable[[], T], timeout_s: float) -> T:
    """Run `call` in a thread; raise `TimeoutError` and abandon the thread after `timeout_s`."""
    result: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return result.result(timeout_s)
    except concurrent.futures.TimeoutError:
        raise TimeoutError(f"no answer within {timeout_s:g} s") from None


def flatten_config(config_yaml: Path) -> dict[str, str]:
    """Return the configuration of a run as dotted keys. Values are cut to 250 characters."""
    import yaml

    flat: dict[str, str] = {}

    def add(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(inner, f"{name}.{key}" if name else str(key))
        else:
            flat[name] = str(value)[:250]

    add(yaml.safe_load(config_yaml.read_text()) or {}, "")
    return flat
