"""Append-only JSON Lines files that tolerate an interrupted last write."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def to_json_line(value: dict[str, Any]) -> str:
    """Encode `value` as one JSON line; raise ValueError if a number is not finite."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append `lines` with one write and sync the file."""
    data = "".join(lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_complete_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of `path`; skip an unterminated last line, left by an interrupted write.

    Raises:
        ValueError: Another line is not JSON. The message names the file and the line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}); delete the line") from error
            yield value
