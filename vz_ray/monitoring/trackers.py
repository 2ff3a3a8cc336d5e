"""Experiment trackers besides TensorBoard: Weights & Biases and MLflow, where they are configured.

Their packages are imported only then. Rows go to them from a thread of each, so that a slow server
delays nothing; which of their runs is this one is kept in the run directory, and a resumed run goes on there.
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
from vz_ray.monitoring.run_dir import RunDir, write_atomic
from vz_ray.utils.errors import UserError

T = TypeVar("T")

MAX_PENDING_ROWS = 1000
"""Rows that may wait for a tracker."""
CLOSE_TIMEOUT_S = 20.0
"""How long the end of a run waits for them."""
START_TIMEOUT_S = 60.0
"""How long a tracker may take to begin a run."""

MetricRow = tuple[int, float, dict[str, float]]
"""Step, seconds since the epoch, values."""


class TrackerRun(Protocol):
    """A tracker's run."""

    def log(self, row: MetricRow) -> None: ...

    def finish(self) -> None: ...


class Tracker:
    """A tracker that is never waited for."""

    def __init__(self, name: str, run: TrackerRun) -> None:
        self.name, self._sink = name, run
        self._behind = BackgroundSink[MetricRow](name, run.log, MAX_PENDING_ROWS)

    @property
    def dropped(self) -> int:
        """Rows that were given up."""
        return self._behind.dropped

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes down a row; values that are not finite are left out, as servers refuse them."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._behind.put((step, time.time(), finite))

    def close(self) -> None:
        """Waits a while for what is still to be sent, and ends the tracker's run."""
        self._behind.close(CLOSE_TIMEOUT_S)
        with suppress(Exception):
            _in_time(self._sink.finish, CLOSE_TIMEOUT_S)


class _MlflowRun:
    """A run of MLflow. Its client is given the run with each call, so nothing global is set."""

    def __init__(self, uri: str, run: RunDir, ids: dict[str, str], config: Mapping[str, str]) -> None:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self._client, self._metric = MlflowClient(tracking_uri=uri), Metric
        if "mlflow" in ids:
            self._client.get_run(ids["mlflow"])
            self._client.update_run(ids["mlflow"], status="RUNNING")
        else:
            named = self._client.get_experiment_by_name("vz_ray")
            experiment = named.experiment_id if named else self._client.create_experiment("vz_ray")
            made = self._client.create_run(experiment, run_name=run.name, tags={"vz_ray.run": str(run.path)})
            ids["mlflow"] = made.info.run_id
            for name, value in config.items():
                self._client.log_param(ids["mlflow"], name, value)
        self._id = ids["mlflow"]

    def log(self, row: MetricRow) -> None:
        step, at_s, values = row
        metrics = [self._metric(name, value, int(at_s * 1000), step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self) -> None:
        self._client.set_terminated(self._id)


class _WandbRun:
    """A run of Weights & Biases. Its own axis is `step`: a resumed run may repeat steps."""

    def __init__(self, project: str, run: RunDir, ids: dict[str, str], config: Mapping[str, str]) -> None:
        import wandb

        ids.setdefault("wandb", uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=project,
            name=run.name,
            id=ids["wandb"],
            resume="allow",
            dir=str(run.logs),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True, init_timeout=START_TIMEOUT_S),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, row: MetricRow) -> None:
        step, _, values = row
        self._run.log({"step": step, **values})

    def finish(self) -> None:
        self._run.finish()


_SINKS: dict[str, Callable[[str, RunDir, dict[str, str], Mapping[str, str]], TrackerRun]] = {
    "wandb_project": _WandbRun,
    "mlflow_uri": _MlflowRun,
}
_PACKAGES = {"wandb_project": ("wandb", "wandb"), "mlflow_uri": ("mlflow", "mlflow")}
"""For each key: the module that it needs, and a package that brings it."""


def check_trackers_installed(configured: Mapping[str, str]) -> None:
    """`UserError` if a tracker is configured whose package is not installed; imports nothing.

    Args:
        configured: Values of the keys `wandb_project` and `mlflow_uri`; empty ones are not wanted.
    """
    for key, value in configured.items():
        module, package = _PACKAGES[key]
        if value and importlib.util.find_spec(module) is None:
            raise UserError(
                f"observe.{key} is {value!r} and {module} is not installed: pip install {package}, or leave "
                "it empty"
            )


def open_trackers(configured: Mapping[str, str], run: RunDir, run_config: Mapping[str, str]) -> list[Tracker]:
    """The trackers that are configured, each with its run begun or gone on with.

    Args:
        configured: See `check_trackers`.
        run_config: What the run was started with, for its page there.

    Raises:
        UserError: One cannot be had; the message names its key.
    """
    check_trackers_installed(configured)
    path = run.path / "trackers.json"
    ids: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    opened = []
    for key, value in configured.items():
        if not value:
            continue
        try:
            sink = _in_time(partial(_SINKS[key], value, run, ids, run_config), START_TIMEOUT_S)
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"observe.{key} is {value!r} and its run could not be begun: {why}; check the address and "
                "who you are logged in as, or leave it empty"
            ) from error
        opened.append(Tracker(_PACKAGES[key][0], sink))
        write_atomic(path, json.dumps(ids).encode())
    return opened


def _in_time(call: Callable[[], T], seconds: float) -> T:
    """What `call` returns; `TimeoutError` where that takes too long, and it is left behind."""
    result: concurrent.futures.Future[T] = concurrent.futures.Future()

    def work() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return result.result(seconds)
    except concurrent.futures.TimeoutError:
        raise TimeoutError(f"no answer within {seconds:g} s") from None


def flatten_config(config_yaml: Path) -> dict[str, str]:
    """A run's configuration, flat, as trackers show it; long values are cut."""
    import yaml

    flat: dict[str, str] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else str(key))
        else:
            flat[name] = str(value)[:250]

    walk(yaml.safe_load(config_yaml.read_text()) or {}, "")
    return flat
