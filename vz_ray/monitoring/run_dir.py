"""One directory per run: what was asked for, what came out, and how to go on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from vz_ray.utils.errors import UserError


@dataclass(frozen=True, slots=True)
class RunDir:
    """`runs/<name>/` with `config.yaml`, `metrics.jsonl`, `episodes/`, `checkpoints/`, `logs/`."""

    path: Path

    @classmethod
    def create_or_resume(
        cls, path: Path | str, config_yaml: str, mutable_keys: Collection[str] = ()
    ) -> tuple[RunDir, bool]:
        """Makes the directory, or goes on with it; True if it was there.

        Args:
            config_yaml: The run's configuration, a key a line.
            mutable_keys: Keys, such as `learner.world_size`, that may be others than the run was begun with; see `update_config`.

        Raises:
            UserError: It holds a run of another configuration, or something
                that is no run at all, or it cannot be written.
        """
        run = cls(Path(path))
        try:
            resumed = run.config.is_file()
            if resumed:
                run._check_same(config_yaml, mutable_keys)
            elif run.path.exists() and not run._only_begun():
                raise UserError(f"{run.path} is not empty and holds no config.yaml: not a run directory")
            for folder in (run.path, run.episodes, run.checkpoints, run.logs):
                folder.mkdir(parents=True, exist_ok=True)
            if not resumed:
                write_atomic(run.config, config_yaml.encode())
        except OSError as error:
            raise UserError(f"cannot use {run.path} as run directory: {error.strerror or error}") from error
        return run, resumed

    @classmethod
    def open(cls, path: Path | str) -> RunDir:
        """An existing run, to read or to go on with; `UserError` if there is none."""
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
        """What the run is doing, while it goes on; see `observe/live.py`."""
        return self.path / "live.json"

    @property
    def prometheus_targets(self) -> Path:
        """Where Prometheus finds the metrics of its cluster, as a file of targets."""
        return self.path / "prometheus_targets.json"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second process from writing the same run; `UserError` if one already does.

        The lock is the kernel's: it goes with the process, however that ends.
        """
        with open(self.path / ".lock", "a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                owner = lock.read().strip() or "unknown"
                raise UserError(
                    f"{self.path} is being written by process {owner}: wait for it or stop it"
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def _only_begun(self) -> bool:
        """Whether it is empty, or holds what a run that was killed at its very beginning leaves."""
        ours = (self.episodes, self.checkpoints, self.logs)
        begun = (*ours, *self.path.glob(f".{self.config.name}.*.tmp"))
        return set(self.path.iterdir()) <= set(begun) and not any(
            any(folder.iterdir()) for folder in ours if folder.is_dir()
        )

    def update_config(self, config_yaml: str) -> None:
        """Notes the configuration that the run goes on with; whoever calls holds the run."""
        if self.config.read_text() != config_yaml:
            write_atomic(self.config, config_yaml.encode())

    def _check_same(self, config_yaml: str, free: Collection[str]) -> None:
        before, now = _without(self.config.read_text(), free), _without(config_yaml, free)
        if before == now:
            return
        pairs = zip([*before, *[""] * len(now)], [*now, *[""] * len(before)], strict=False)
        was, is_now = next((a.strip(), b.strip()) for a, b in pairs if a != b)
        raise UserError(
            f"{self.path} holds a run of another configuration ('{was}' there, '{is_now}' now): "
            "choose another name, or delete it to start afresh"
        )


def _without(config_yaml: str, keys: Collection[str]) -> list[str]:
    """The lines of a configuration but those of some keys, `learner.world_size` for `ranks` within `learner`."""
    lines, path = [], [""]
    for line in config_yaml.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        path[depth:] = [line.strip().partition(":")[0]]
        if ".".join(path) not in keys:
            lines.append(line)
    return lines


def write_atomic(path: Path, content: bytes) -> None:
    """Writes the whole file or leaves what was there; on disk when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


@contextlib.contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """A directory to fill; it becomes `final` when the block ends well, replacing one that was there.

    A directory of that name is therefore always complete. What an interrupted
    block left is deleted by the next one.
    """
    partial = partial_path(final)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    sync_directory(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    sync_directory(final.parent)


def partial_path(final: Path) -> Path:
    """What `whole_directory` calls a directory that is being filled."""
    return final.with_name(f".{final.name}.partial")


def sync_directory(path: Path) -> None:
    """Makes renames within this directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
