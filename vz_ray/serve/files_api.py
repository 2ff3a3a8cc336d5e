"""The Files API: videos and images that are uploaded once and shown in many requests.

    POST   /v1/files               multipart: `file`, `purpose`, perhaps `expires_after[...]`
    GET    /v1/files               those of the key that asks
    GET    /v1/files/{id}          ... one of them
    GET    /v1/files/{id}/content  ... its bytes, ranges of it too
    DELETE /v1/files/{id}

As OpenAI's, with what is known of a video besides. A body goes straight to where
the file stays, and a file that cannot be read as a video or image is not kept.
Other keys' files are not there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from vz_ray.config.serve import AccessConfig, UploadsConfig
from vz_ray.serve.access_control import UPLOADS_PATH, request_owner
from vz_ray.serve.api_errors import from_video_error, invalid_request, not_found
from vz_ray.serve.file_store import FileStore, IncomingFile, StoredFile
from vz_ray.serve.multipart import FormPart, parse_multipart
from vz_ray.video.disk_cache import resolve_cache_dir
from vz_ray.video.frame import VideoError, VideoInfo

__all__ = ["FileStore", "VideoProbe", "ImageCheck", "open_store", "files_router"]

VideoProbe = Callable[[str], Awaitable[VideoInfo]]
"""Opens the video at a path, somewhere where that may take the process with it; raises VideoError."""
ImageCheck = Callable[[str], Awaitable[object]]
"""Decodes the image at a path, in the same way."""

PURPOSES = ("user_data", "vision", "assistants")
_BLOCK = 2**20
_FIELD_BYTES = 256
_SHORTEST_S, _LONGEST_S = 3600, 30 * 86400
"""What OpenAI allows for `expires_after[seconds]`."""


def open_store(files: UploadsConfig, guard: AccessConfig) -> FileStore:
    """The store that the configuration asks for.

    Raises:
        UserError: Its directory cannot be written.
    """
    return FileStore(
        upload_directory(files), int(files.max_gib * 2**30), files.ttl_days, int(guard.max_upload_gib * 2**30)
    )


def upload_directory(files: UploadsConfig) -> Path:
    """Where uploads are kept."""
    return Path(files.directory) if files.directory else resolve_cache_dir("") / "uploads"


@dataclass(slots=True)
class _Form:
    """What an upload says besides the file.

    Attributes:
        filename: None until the file has come.
    """

    filename: str | None = None
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def purpose(self) -> str:
        told = self.fields.get("purpose", "user_data")
        if told not in PURPOSES:
            raise invalid_request(f"purpose must be one of {', '.join(PURPOSES)}.", "purpose")
        return told

    @property
    def expires_s(self) -> float | None:
        if self.fields.get("expires_after[anchor]", "created_at") != "created_at":
            raise invalid_request("expires_after[anchor] must be created_at.", "expires_after[anchor]")
        told = self.fields.get("expires_after[seconds]")
        if told is None:
            return None
        if not (told.isdecimal() and len(told) < 9 and _SHORTEST_S <= int(told) <= _LONGEST_S):
            raise invalid_request(
                f"expires_after[seconds] must be a number from {_SHORTEST_S} to {_LONGEST_S}.",
                "expires_after[seconds]",
            )
        return float(told)


_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


async def _received(request: Request, incoming: IncomingFile) -> _Form:
    """Writes the file of a form to the store as it arrives, and returns the rest."""
    form, part, block = _Form(), None, bytearray()
    async for event in parse_multipart(request.headers.get("content-type", ""), request.stream()):
        if isinstance(event, FormPart):
            part, block = event, bytearray()
            _check_part(part, form)
            if part.name == "file":
                form.filename = part.filename
        elif part is None:
            continue
        elif isinstance(event, bytes):
            block += event
            if part.name == "file" and len(block) >= _BLOCK:
                await run_in_threadpool(incoming.write, bytes(block))
                block.clear()
            elif part.name != "file" and len(block) > _FIELD_BYTES:
                raise invalid_request(f"{part.name} is longer than {_FIELD_BYTES} bytes.", part.name)
        elif part.name == "file":
            await run_in_threadpool(incoming.write, bytes(block))
            await run_in_threadpool(incoming.finish)
        else:
            form.fields[part.name] = block.decode("utf-8", "replace")
    if form.filename is None:
        raise invalid_request("The form has no file.", "file", "missing_parameter")
    return form


def _check_part(part: FormPart, form: _Form) -> None:
    if part.name == "file":
        if part.filename is None:
            raise invalid_request("The part `file` has no filename.", "file")
        if form.filename is not None:
            raise invalid_request("The form has more than one file.", "file")
        return
    if part.name not in _FIELDS:
        known = ", ".join(("file", *_FIELDS))
        raise invalid_request(
            f"The form has a field that is not known; there are {known}.", code="unknown_parameter"
        )
    if part.filename is not None:
        raise invalid_request(f"{part.name} must be a field, not a file.", part.name)
    if part.name in form.fields:
        raise invalid_request(f"{part.name} is given twice.", part.name)


def files_router(store: FileStore, probe: VideoProbe, look: ImageCheck) -> APIRouter:
    """The Files API over `store`; `probe` and `look` say whether a file can be shown to a model."""
    routes = APIRouter()

    @routes.post(UPLOADS_PATH)
    async def upload(request: Request) -> dict[str, Any]:
        async with store.incoming(request_owner(request)) as incoming:
            form = await _received(request, incoming)
            assert form.filename is not None
            purpose, expires_s = form.purpose, form.expires_s
            info = await _opened(incoming, probe, look)
            stored = await run_in_threadpool(store.add, incoming, form.filename, purpose, expires_s, info)
        return file_object(stored)

    @routes.get(UPLOADS_PATH)
    async def listed(
        request: Request,
        purpose: str | None = None,
        order: Literal["asc", "desc"] = "desc",
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        after: str | None = None,
    ) -> dict[str, Any]:
        found = await run_in_threadpool(store.list_files, request_owner(request))
        found = [one for one in found if purpose is None or one.purpose == purpose]
        return _page(found if order == "asc" else found[::-1], limit, after)

    @routes.get(f"{UPLOADS_PATH}/{{id}}")
    async def one(id: str, request: Request) -> dict[str, Any]:
        return file_object(await _found(store, id, request))

    @routes.get(f"{UPLOADS_PATH}/{{id}}/content")
    async def content(id: str, request: Request) -> Response:
        stored = await _found(store, id, request)
        return FileResponse(
            store.path(stored),
            media_type=stored.file_type.content_type,
            filename=stored.filename,
            headers={"cache-control": "private, max-age=3600"},
        )

    @routes.delete(f"{UPLOADS_PATH}/{{id}}")
    async def delete(id: str, request: Request) -> dict[str, Any]:
        stored = await _found(store, id, request)
        await run_in_threadpool(store.delete, stored)
        return {"id": stored.id, "object": "file", "deleted": True}

    return routes


async def _opened(incoming: IncomingFile, probe: VideoProbe, look: ImageCheck) -> VideoInfo | None:
    try:
        if incoming.file_type.modality == "video":
            return await probe(str(incoming.path))
        await look(str(incoming.path))
    except VideoError as error:
        raise from_video_error(error, "file") from error
    return None


async def _found(store: FileStore, id: str, request: Request) -> StoredFile:
    stored = await run_in_threadpool(store.get, id, request_owner(request))
    if stored is None:
        raise not_found("There is no such file.", "id")
    return stored


def _page(found: list[StoredFile], limit: int, after: str | None) -> dict[str, Any]:
    if after is not None:
        places = [place for place, one in enumerate(found) if one.id == after]
        if not places:
            raise invalid_request("There is no file `after` which to go on.", "after")
        found = found[places[0] + 1 :]
    data = [file_object(one) for one in found[:limit]]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(found) > limit,
    }


def file_object(stored: StoredFile) -> dict[str, Any]:
    """OpenAI's file object, with what is known of a video besides."""
    return {
        "id": stored.id,
        "object": "file",
        "bytes": stored.bytes,
        "created_at": int(stored.created_at),
        "expires_at": None if stored.expires_at is None else int(stored.expires_at),
        "filename": stored.filename,
        "purpose": stored.purpose,
        "status": "processed",
        "content_type": stored.file_type.content_type,
        "duration_s": stored.duration_s,
        "width": stored.width,
        "height": stored.height,
    }
