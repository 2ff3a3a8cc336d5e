"""Streaming parser of multipart/form-data bodies; it buffers headers only."""

from __future__ import annotations

import re
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from vz_ray.serve.api_errors import ApiError, invalid_request

MAX_PARTS = 8
MAX_FILENAME_BYTES = 255
"""The usual limit of file systems."""
_MAX_HEADERS = 8
_MAX_HEADER_BYTES = 4096


@dataclass(slots=True)
class FormPart:
    """Start of a part.

    Attributes:
        name: Name of the form field.
        filename: The client's file name, without directories; None for a plain field.
    """

    name: str
    filename: str | None


FormEvent = FormPart | bytes | None
"""Start of a part, a chunk of its content, or None at its end."""


async def parse_multipart(content_type: str, chunks: AsyncIterable[bytes]) -> AsyncIterator[FormEvent]:
    """Parse a multipart/form-data body and yield its events.

    Raises:
        ApiError: 400; the body is invalid or incomplete, or has too many parts or headers.
    """
    media_type, options = parse_options_header(content_type.encode("latin-1", "replace"))
    boundary = options.get(b"boundary", b"")
    if media_type != b"multipart/form-data" or not boundary:
        raise _invalid("the content-type has no boundary")
    collector = _EventCollector()
    try:
        parser = MultipartParser(
            boundary, collector.callbacks(), max_header_count=_MAX_HEADERS, max_header_size=_MAX_HEADER_BYTES
        )
        async for chunk in chunks:
            parser.write(chunk)
            for event in collector.take():
                yield event
    except FormParserError as error:
        raise _invalid("it cannot be parsed") from error
    if not collector.ended:
        raise _invalid("it ends before the last boundary")


@dataclass(slots=True)
class _EventCollector:
    """Parser callbacks; collects events until `take` is called."""

    ended: bool = False
    _events: list[FormEvent] = field(default_factory=list)
    _parts: int = 0
    _field: bytes = b""
    _value: bytes = b""
    _headers: dict[bytes, bytes] = field(default_factory=dict)

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._headers.clear,
            "on_header_field": self._on_field,
            "on_header_value": self._on_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers,
            "on_part_data": self._on_data,
            "on_part_end": lambda: self._events.append(None),
            "on_end": self._on_end,
        }

    def take(self) -> list[FormEvent]:
        events, self._events = self._events, []
        return events

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._field.lower()] = self._value
        self._field = self._value = b""

    def _on_headers(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _invalid(f"it has more than {MAX_PARTS} parts")
        self._events.append(_part(self._headers.get(b"content-disposition", b"")))

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._events.append(data[start:end])

    def _on_end(self) -> None:
        self.ended = True


def _part(disposition: bytes) -> FormPart:
    disposition_type, options = parse_options_header(disposition)
    if disposition_type != b"form-data" or not options.get(b"name"):
        raise _invalid("a part has no name")
    filename = options.get(b"filename")
    if filename is not None and len(filename) > MAX_FILENAME_BYTES:
        raise invalid_request(f"The file's name is longer than {MAX_FILENAME_BYTES} bytes.", "file")
    return FormPart(
        options[b"name"].decode("utf-8", "replace"), None if filename is None else sanitize_filename(filename)
    )


def sanitize_filename(filename: bytes) -> str:
    """Return a file name without directories, control characters, quotes and angle brackets."""
    name = re.split(r"[/\\]", filename.decode("utf-8", "replace"))[-1]
    name = "".join(char for char in name if char.isprintable() and char not in '"<>').strip(". ")
    return name or "file"


def _invalid(reason: str) -> ApiError:
    return invalid_request(f"The multipart body is invalid: {reason}.", code="invalid_multipart")
