"""A multipart body, part by part as it arrives: nothing is kept that its reader does not keep."""

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
"""Bytes of a file's name, as file systems have it."""
_HEADERS = 8
_HEADER_BYTES = 4096


@dataclass(slots=True)
class FormPart:
    """The beginning of a part.

    Attributes:
        name: Of the form's field.
        filename: What the client calls the file, without folders; None where it is no file.
    """

    name: str
    filename: str | None


FormEvent = FormPart | bytes | None
"""A part begins, some of its content, a part ends."""


async def parse_multipart(content_type: str, chunks: AsyncIterable[bytes]) -> AsyncIterator[FormEvent]:
    """What happens in a multipart/form-data body.

    Raises:
        ApiError: 400; it is broken, has too many parts or headers, or ends too early.
    """
    kind, options = parse_options_header(content_type.encode("latin-1", "replace"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise _broken("its content-type names no boundary")
    reading = _Reading()
    try:
        parser = MultipartParser(
            boundary, reading.callbacks(), max_header_count=_HEADERS, max_header_size=_HEADER_BYTES
        )
        async for chunk in chunks:
            parser.write(chunk)
            for event in reading.taken():
                yield event
    except FormParserError as error:
        raise _broken("it cannot be parsed") from error
    if not reading.ended:
        raise _broken("it ends before its last boundary")


@dataclass(slots=True)
class _Reading:
    """What the parser has found since it was last asked."""

    ended: bool = False
    _found: list[FormEvent] = field(default_factory=list)
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
            "on_part_end": lambda: self._found.append(None),
            "on_end": self._on_end,
        }

    def taken(self) -> list[FormEvent]:
        found, self._found = self._found, []
        return found

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
            raise _broken(f"it has more than {MAX_PARTS} parts")
        self._found.append(_part(self._headers.get(b"content-disposition", b"")))

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._found.append(data[start:end])

    def _on_end(self) -> None:
        self.ended = True


def _part(disposition: bytes) -> FormPart:
    kind, options = parse_options_header(disposition)
    if kind != b"form-data" or not options.get(b"name"):
        raise _broken("a part of it has no name")
    filename = options.get(b"filename")
    if filename is not None and len(filename) > MAX_FILENAME_BYTES:
        raise invalid_request(f"The file's name is longer than {MAX_FILENAME_BYTES} bytes.", "file")
    return FormPart(
        options[b"name"].decode("utf-8", "replace"), None if filename is None else sanitize_filename(filename)
    )


def sanitize_filename(filename: bytes) -> str:
    """The last part of a path, for people: no folders, no signs that a terminal or a header would obey."""
    name = re.split(r"[/\\]", filename.decode("utf-8", "replace"))[-1]
    name = "".join(sign for sign in name if sign.isprintable() and sign not in '"<>').strip(". ")
    return name or "file"


def _broken(why: str) -> ApiError:
    return invalid_request(f"The multipart body is broken: {why}.", code="invalid_multipart")
