"""The Files API: upload videos and images once and use them in several requests.

    POST   /v1/files               multipart: `file`, `purpose`, optional `expires_after[...]`
    GET    /v1/files               list the files of the API key
    GET    /v1/files/{id}          metadata
    GET    /v1/files/{id}/content  content, with range requests
    DELETE /v1/files/{id}

Follows OpenAI's API, with metadata of videos added. An upload is streamed to disk and deleted if it cannot be
decoded. Files of other keys are reported as missing.
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
from vz_ray.serve.access_control import UPLOADS_PATH, owner_id
from vz_ray.serve.api_errors import from_video_error, invalid_request, not_found
from vz_ray.serve.file_store import FileStore, IncomingFile, StoredFile
from vz_ray.serve.multipart import FormPart, parse_multipart
from vz_ray.video.disk_cache import resolve_cache_dir
from vz_ray.video.errors import VideoError
from vz_ray.video.frame import VideoInfo

VideoProbe = Callable[[str], Awaitable[VideoInfo]]
"""Reads the metadata of a video in a separate process; raises `VideoError`."""
ImageCheck = Callable[[str], Awaitable[object]]
"""Decodes an image in a separate process; raises `VideoError`."""

PURPOSES = ("user_data", "vision", "assistants")
_BLOCK = 2**20
_MAX_FIELD_BYTES = 256
_MIN_EXPIRY_S, _MAX_EXPIRY_S = 3600, 30 * 86400
"""OpenAI's range of `expires_after[seconds]`."""


def open_store(files: UploadsConfig, access: AccessConfig) -> FileStore:
    """Create the file store of a configuration.

    Raises:
        UserError: The directory is not writable.
    """
    return FileStore(
        upload_directory(files),
        int(files.max_gib * 2**30),
        files.ttl_days,
        int(access.max_upload_gib * 2**30),
    )


def upload_directory(files: UploadsConfig) -> Path:
    """Return the directory of uploads; the default is in the user's cache directory."""
    return Path(files.directory) if files.directory else resolve_cache_dir("") / "uploads"


@dataclass(slots=True)
class _Form:
    """Fields of an upload form.

    Attributes:
        filename: Name of the file; None until the file is received.
        fields: Other fields by name.
    """

    filename: str | None = None
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def purpose(self) -> str:
        purpose = self.fields.get("purpose", "user_data")
        if purpose not in PURPOSES:
            raise invalid_request(f"purpose must be one of {', '.join(PURPOSES)}.", "purpose")
        return purpose

    @property
    def expires_s(self) -> float | None:
        if self.fields.get("expires_after[anchor]", "created_at") != "created_at":
            raise invalid_request("expires_after[anchor] must be created_at.", "expires_after[anchor]")
        seconds = self.fields.get("expires_after[seconds]")
        if seconds is None:
            return None
        if not (seconds.isdecimal() and len(seconds) < 9 and _MIN_EXPIRY_S <= int(seconds) <= _MAX_EXPIRY_S):
            raise invalid_request(
                f"expires_after[seconds] must be a number from {_MIN_EXPIRY_S} to {_MAX_EXPIRY_S}.",
                "expires_after[seconds]",
            )
        return float(seconds)


_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


async def _receive_form(request: Request, incoming: IncomingFile) -> _Form:
    """Stream the file of a form to the store and return the form."""
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
            elif part.name != "file" and len(block) > _MAX_FIELD_BYTES:
                raise invalid_request(f"{part.name} is longer than {_MAX_FIELD_BYTES} bytes.", part.name)
        elif part.name == "file":
            await run_in_threadpool(incoming.write, bytes(block))
            await run_in_threadpool(incoming.finish)
        else:
            form.fields[part.name] = block.decode("utf-8", "replace")
    if form.filename is None:
        raise invalid_request("The form has no field `file`.", "file", "missing_parameter")
    return form


def _check_part(part: FormPart, form: _Form) -> None:
    if part.name == "file":
        if part.filename is None:
            raise invalid_request("The part `file` has no filename.", "file")
        if form.filename is not None:
            raise invalid_request("The form has more than one file.", "file")
        return
    if part.name not in _FIELDS:
        allowed = ", ".join(("file", *_FIELDS))
        raise invalid_request(f"The form has an unknown field; allowed fields: {allowed}.", code="unknown_parameter")
    if part.filename is not None:
        raise invalid_request(f"{part.name} must be a field, not a file.", part.name)
    if part.name in form.fields:
        raise invalid_request(f"{part.name} is given twice.", part.name)


def files_router(store: FileStore, probe_video: VideoProbe, check_image: ImageCheck) -> APIRouter:
    """Return the routes of the Files API. The callbacks verify that a file can be decoded."""
    routes = APIRouter()

    @routes.post(UPLOADS_PATH)
    async def upload(request: Request) -> dict[str, Any]:
        async with store.incoming(owner_id(request)) as incoming:
            form = await _receive_form(request, incoming)
            assert form.filename is not None
            purpose, expires_s = form.purpose, form.expires_s
            info = await _verify(incoming, probe_video, check_image)
            stored = await run_in_threadpool(store.add, incoming, form.filename, purpose, expires_s, info)
        return file_object(stored)

    @routes.get(UPLOADS_PATH)
    async def list_files(
        request: Request,
        purpose: str | None = None,
        order: Literal["asc", "desc"] = "desc",
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        after: str | None = None,
    ) -> dict[str, Any]:
        files = await run_in_threadpool(store.list_files, owner_id(request))
        files = [file for file in files if purpose is None or file.purpose == purpose]
        return _page(files if order == "asc" else files[::-1], limit, after)

    @routes.get(f"{UPLOADS_PATH}/{{id}}")
    async def get_file(id: str, request: Request) -> dict[str, Any]:
        return file_object(await _get_file(store, id, request))

    @routes.get(f"{UPLOADS_PATH}/{{id}}/content")
    async def content(id: str, request: Request) -> Response:
        stored = await _get_file(store, id, request)
        return FileResponse(
            store.path(stored),
            media_type=stored.file_type.content_type,
            filename=stored.filename,
            headers={"cache-control": "private, max-age=3600"},
        )

    @routes.delete(f"{UPLOADS_PATH}/{{id}}")
    async def delete(id: str, request: Request) -> dict[str, Any]:
        stored = await _get_file(store, id, request)
        await run_in_threadpool(store.delete, stored)
        return {"id": stored.id, "object": "file", "deleted": True}

    return routes


async def _verify(incoming: IncomingFile, probe_video: VideoProbe, check_image: ImageCheck) -> VideoInfo | None:
    try:
        if incoming.file_type.modality == "video":
            return await probe_video(str(incoming.path))
        await check_image(str(incoming.path))
    except VideoError as error:
        raise from_video_error(error, "file") from error
    return None


async def _get_file(store: FileStore, id: str, request: Request) -> StoredFile:
    stored = await run_in_threadpool(store.get, id, owner_id(request))
    if stored is None:
        raise not_found("The file does not exist.", "id")
    return stored


def _page(files: list[StoredFile], limit: int, after: str | None) -> dict[str, Any]:
    if after is not None:
        positions = [index for index, file in enumerate(files) if file.id == after]
        if not positions:
            raise invalid_request("The file `after` does not exist.", "after")
        files = files[positions[0] + 1 :]
    data = [file_object(file) for file in files[:limit]]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(files) > limit,
    }


def file_object(stored: StoredFile) -> dict[str, Any]:
    """Build OpenAI's file object, with metadata of videos added."""
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
