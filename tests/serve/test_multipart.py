"""Multipart parser with arbitrary chunk boundaries."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vz_ray.serve.api_errors import ApiError
from vz_ray.serve.multipart import MAX_FILENAME_BYTES, MAX_PARTS, FormPart, parse_multipart, sanitize_filename


def read(content_type: str, body: bytes, cuts: list[int]) -> list[tuple[str, str | None, bytes]]:
    """Return (name, filename, content) of each part of a body that arrives in chunks."""
    places = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})

    async def chunks() -> AsyncIterator[bytes]:
        for start, end in pairwise(places):
            yield body[start:end]

    async def parts() -> list[tuple[str, str | None, bytes]]:
        parts: list[tuple[str, str | None, bytes]] = []
        async for event in parse_multipart(content_type, chunks()):
            if isinstance(event, FormPart):
                parts.append((event.name, event.filename, b""))
            elif event is not None:
                parts[-1] = (*parts[-1][:2], parts[-1][2] + event)
        return parts

    return asyncio.run(parts())


NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(
    fields=st.dictionaries(NAMES, st.text(max_size=50), max_size=3),
    name=NAMES,
    content=st.binary(max_size=2000),
    cuts=st.lists(st.integers(0, 5000), max_size=20),
)
def test_parts_are_independent_of_chunk_boundaries(fields, name, content, cuts):
    request = httpx.Request("POST", "http://a", data=fields, files={"file": (f"{name}.mp4", content)})
    parts = read(request.headers["content-type"], request.read(), cuts)
    assert parts == [
        *((key, None, value.encode()) for key, value in fields.items()),
        ("file", f"{name}.mp4", content),
    ]


@settings(max_examples=200, deadline=None)
@given(body=st.binary(max_size=500), cuts=st.lists(st.integers(0, 500), max_size=5))
def test_random_bytes_raise_only_api_errors(body, cuts):
    for start in (b"", b"--b\r\n", b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n'):
        with pytest.raises(ApiError, match="multipart"):
            read("multipart/form-data; boundary=b", start + body, cuts)


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_filenames_are_sanitized(name):
    safe = sanitize_filename(name)
    assert safe
    assert safe.isprintable()
    assert not set(safe) & set('/\\"<>')
    assert not safe.startswith(".")


def part(disposition: str, more: str = "", content: str = "x") -> bytes:
    return f"--b\r\nContent-Disposition: {disposition}\r\n{more}\r\n{content}\r\n".encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b--\r\n"[:3],
        part('form-data; name="a"'),
        part("form-data") + b"--b--\r\n",
        part('attachment; name="a"') + b"--b--\r\n",
        part('form-data; name="a"') * (MAX_PARTS + 1) + b"--b--\r\n",
        part('form-data; name="a"', "X: y\r\n" * 20) + b"--b--\r\n",
        part('form-data; name="a"', f"X: {'y' * 10_000}\r\n") + b"--b--\r\n",
    ],
)
def test_invalid_bodies_are_refused(body):
    with pytest.raises(ApiError, match="The multipart body is invalid"):
        read("multipart/form-data; boundary=b", body, [])


def test_too_long_filename_is_refused():
    body = part(f'form-data; name="file"; filename="{"a" * (MAX_FILENAME_BYTES + 1)}"') + b"--b--\r\n"
    with pytest.raises(ApiError, match="longer than 255 bytes"):
        read("multipart/form-data; boundary=b", body, [])


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=", "text/plain; boundary=b"])
def test_missing_boundary_is_refused(kind):
    with pytest.raises(ApiError, match="has no boundary"):
        read(kind, b"--b--\r\n", [])
    with pytest.raises(ApiError, match="cannot be parsed"):
        read(f"multipart/form-data; boundary={'b' * 1000}", b"--b--\r\n", [])
