"""Run directory: configuration, metrics, episodes, checkpoints, logs, stage times, and the lock of a run."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.errors import UserError
from vz_ray.utils.json_lines import append_lines, read_complete_lines, to_json_line

_FILES_BEFORE_RESULTS = {
    *("config.yaml", "episodes", "checkpoints", "logs"),
    *(".lock", "stages.jsonl", "live.json", "prometheus_targets.json"),
}
_NOT_SET = object()


@dataclass(frozen=True, slots=True)
class RunDir:
    """`runs/<name>/` with `config.yaml`, `metrics.jsonl`, `episodes/`, `checkpoints/`, `logs/`."""

    path: Path

    @classmethod
    def create_or_resume(
        cls, path: Path | str, config_yaml: str, mutable_keys: Collection[str] = ()
    ) -> tuple[RunDir, bool]:
        """Create or reopen a run directory; return it and whether it existed.

        Args:
            config_yaml: Configuration of the run, one key per line.
            mutable_keys: Dotted keys, such as `learner.world_size`, that may change on resume;
                see `update_config`.

        Raises:
            UserError: The directory holds results of a run with another configuration, is in use by a run with
                another configuration, is not a run directory, or is not writable.
        """
        run = cls(Path(path))
        try:
            resumed = run.config.is_file()
            if resumed:
                run._check_same_config(config_yaml, mutable_keys)
            elif run.path.exists() and not run._is_fresh():
                raise UserError(f"{run.path} is not empty and has no config.yaml: not a run directory")
            for folder in (run.path, run.episodes, run.checkpoints, run.logs):
                folder.mkdir(parents=True, exist_ok=True)
            if not resumed:
                write_atomic(run.config, config_yaml.encode())
        except OSError as error:
            raise UserError(f"cannot use {run.path} as run directory: {error.strerror or error}") from error
        return run, resumed

    @classmethod
    def open(cls, path: Path | str) -> RunDir:
        """Open an existing run directory; raise `UserError` if `path` is not one."""
        run = cls(Path(path))
        if not run.config.is_file():
            raise UserError(f"no run at {run.path}: config.yaml is missing")
        return run

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def episodes(self) -> Path:
        return self.path / "episodes"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def live_status(self) -> Path:
        """Live status of the run; see `monitoring/live_status.py`."""
        return self.path / "live.json"

    @property
    def prometheus_targets(self) -> Path:
        """Prometheus targets of the run's nodes, in the format of `file_sd_configs`."""
        return self.path / "prometheus_targets.json"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run lock; raise `UserError` if another process holds it.

        The kernel releases the lock when the process ends, also after a crash.
        """
        with open(self.path / ".lock", "a+") as lock_file:
            try:
                fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock_file.seek(0)
                owner = lock_file.read().strip() or "unknown"
                raise UserError(f"{self.path} is in use by process {owner}; wait for that run or stop it") from None
            except OSError as error:
                raise UserError(
                    f"the file system of {self.path} has no file locks ({error.strerror}), which keep two runs apart; "
                    "mount Lustre with the option flock, or set runs to a file system with locks, such as NFS 4"
                ) from error
            lock_file.truncate(0)
            lock_file.write(str(os.getpid()))
            lock_file.flush()
            yield

    def _is_fresh(self) -> bool:
        """Whether the directory holds at most what a run killed during its creation leaves behind."""
        folders = (self.episodes, self.checkpoints, self.logs)
        expected = (*folders, *self.path.glob(f".{self.config.name}.*.tmp"))
        return set(self.path.iterdir()) <= set(expected) and not any(
            any(folder.iterdir()) for folder in folders if folder.is_dir()
        )

    def update_config(self, config_yaml: str) -> None:
        """Store the configuration of a resumed run. The caller must hold the run lock."""
        if self.config.read_text() != config_yaml:
            write_atomic(self.config, config_yaml.encode())

    def _check_same_config(self, config_yaml: str, mutable_keys: Collection[str]) -> None:
        """Raise `UserError` if the stored config differs; replace it if the run has no results yet."""
        stored = _settings(self.config.read_text(), mutable_keys)
        new = _settings(config_yaml, mutable_keys)
        if stored == new:
            return
        with self.lock():  # a live run is reported first: its directory must not be deleted
            if not self._has_results():
                self.update_config(config_yaml)
                return
        key = next(key for key in (*stored, *new) if stored.get(key, _NOT_SET) != new.get(key, _NOT_SET))
        raise UserError(
            f"{self.path} holds a run with another configuration (stored: {_format_setting(key, stored)}, "
            f"now: {_format_setting(key, new)}); choose another name, or delete the directory"
        )

    def _has_results(self) -> bool:
        """Whether the directory holds more than what a run writes before its first step."""
        names = {entry.name for entry in self.path.iterdir()}
        return bool(names - _FILES_BEFORE_RESULTS) or any(
            any(folder.iterdir()) for folder in (self.episodes, self.checkpoints) if folder.is_dir()
        )


def _format_setting(key: str, settings: dict[str, Any]) -> str:
    """Example: `'train.group_size: 2'`, or `'train.group_size' is not set`."""
    return f"'{key}: {settings[key]}'" if key in settings else f"'{key}' is not set"


def _settings(config_yaml: str, excluded: Collection[str]) -> dict[str, Any]:
    """Return the value of each dotted key without `excluded`; a list is one value, an empty section has none."""
    settings: dict[str, Any] = {}

    def add(section: dict[str, Any], prefix: str) -> None:
        for name, value in section.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict):
                add(value, f"{key}.")
            elif key not in excluded:
                settings[key] = value

    add(yaml.safe_load(config_yaml) or {}, "")
    return settings


def record_stage_time(run_dir: Path, stage: str, wall_s: float) -> None:
    """Append `wall_s` seconds to the time of `stage`; a resumed stage is recorded in parts."""
    append_lines(run_dir / "stages.jsonl", [to_json_line({"stage": stage, "wall_s": wall_s})])


def stage_seconds(run_dir: Path) -> dict[str, float]:
    """Return the wall seconds of each stage, in the order of the first start, and their `total`."""
    seconds: defaultdict[str, float] = defaultdict(float)
    path = run_dir / "stages.jsonl"
    for line in read_complete_lines(path) if path.exists() else ():
        seconds[line["stage"]] += line["wall_s"]
    return {**seconds, "total": sum(seconds.values())} if seconds else {}
