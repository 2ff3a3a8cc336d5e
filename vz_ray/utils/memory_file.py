"""Anonymous memory of a process that other processes of the machine can open."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import IO


class ProcessEndedError(RuntimeError):
    """The process that owns a memory file has ended."""


@dataclass(frozen=True, slots=True)
class MemoryFile:
    """Handle of anonymous memory; valid in every process of the machine while its owner runs.

    Attributes:
        pid: Process that owns the memory.
        descriptor: File descriptor in that process.
        name: Unique name. It distinguishes the process from a later one with the same id.
    """

    pid: int
    descriptor: int
    name: str

    @classmethod
    def create(cls, purpose: str) -> MemoryFile:
        """Create an empty file in this process; it lives until the process ends."""
        name = f"{purpose}-{uuid.uuid4().hex}"
        return cls(os.getpid(), os.memfd_create(name), name)

    def open(self, mode: str) -> IO[bytes]:
        """Open the file in binary `mode`.

        Raises:
            ProcessEndedError: The owner has ended.
        """
        path = Path(f"/proc/{self.pid}/fd/{self.descriptor}")
        try:
            if self.name not in os.readlink(path):
                raise ProcessEndedError(f"process {self.pid} has ended, and another process has its id")
            return path.open(mode)
        except OSError as error:
            raise ProcessEndedError(f"process {self.pid} has ended") from error


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag that any process of the machine can set and only a new process has cleared again."""

    file: MemoryFile

    @classmethod
    def create(cls, purpose: str) -> Flag:
        """Create a flag of this process that is not set."""
        return cls(MemoryFile.create(purpose))

    def set(self) -> None:
        """Set the flag, also from another process; raise `ProcessEndedError` if its process has ended."""
        with self.file.open("r+b") as file:
            file.write(b"1")

    def is_set(self) -> bool:
        """Return whether the flag is set; only for its own process."""
        return os.fstat(self.file.descriptor).st_size > 0
