"""Resolve the videos and images of a request to URIs that the decoders can open.

    file-...            upload of the same API key
    data:video/mp4;...  inline: written to the file store, deleted when the request ends
    https://...         fetched by the decoders, which also check the resolved addresses
    /path, file:///...  inside `files.allowed_dirs`, after resolving symbolic links

Everything else is rejected. Errors do not disclose which files exist on the server.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import AsyncIterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from vz_ray.serve.api_errors import ApiError, from_video_error, invalid_request, not_found
from vz_ray.serve.file_store import FileStore, IncomingFile
from vz_ray.serve.file_types import DECLARED_MODALITIES, Modality
from vz_ray.video.errors import SourceNotAllowedError
from vz_ray.video.remote import DownloadRules, check_url

_DATA = re.compile(r"data:([a-z0-9.+-]+/[a-z0-9.+-]+)(?:;[a-z0-9=\"._-]+)*;base64,", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_BLOCK = 4 * 2**18
"""Characters of base64 that are decoded per write."""
_MAX_MEDIA = 64
"""Maximum number of videos and images per request."""
_MAX_PREFIX_CHARS = 256


@dataclass(frozen=True, slots=True)
class ResolvedMedia:
    """A resolved video or image.

    Attributes:
        uri: URL or path.
        modality: `video` or `image`. It is explicit because the suffix of the URI may be misleading.
    """

    uri: str
    modality: Modality


class MediaResolver:
    """Resolves the media of one request. Inline media are deleted when the context exits.

    Args:
        store: Uploads and inline media.
        owner: Owner id of the request.
        rules: Allowed URLs; the same rules as in the decode pool.
        allowed_dirs: Directories whose files may be requested by path; empty rejects all paths.

    Example:
        async with MediaResolver(store, owner_id(request), rules, config.files.allowed_dirs) as media:
            source = await media.resolve(part.video_url.url, "video", param="messages.0.content.1")
    """

    def __init__(self, store: FileStore, owner: str, rules: DownloadRules, allowed_dirs: Sequence[str] = ()) -> None:
        self._store, self._owner, self._rules = store, owner, rules
        self._allowed_dirs = tuple(os.path.realpath(path) for path in allowed_dirs)
        self._stack, self._count = AsyncExitStack(), 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def resolve(self, url: str, expected: Modality, param: str | None = None) -> ResolvedMedia:
        """Resolve a URL, path, `data:` URI or upload id.

        Args:
            url: Value from the request.
            expected: Modality that the request declares.
            param: Path of the field in the request, for errors.

        Raises:
            ApiError: 400, 404 (missing, or a file of another owner), 413 or 507.
        """
        self._count += 1
        if self._count > _MAX_MEDIA:
            raise invalid_request(f"A request may have {_MAX_MEDIA} videos and images.", param, "too_many_media")
        scheme = _SCHEME.match(url[:64])
        if url.startswith("file-"):
            return await self._upload(url, expected, param)
        if scheme is None:
            return ResolvedMedia(await run_in_threadpool(self._local, url, param), expected)
        if scheme[0].lower() == "data:":
            return ResolvedMedia(await self._inline(url, expected, param), expected)
        if scheme[0].lower() == "file:":
            return ResolvedMedia(await run_in_threadpool(self._local, _path_of(url, param), param), expected)
        try:
            check_url(url, self._rules)
        except SourceNotAllowedError as error:
            raise _rejected(param) from error
        return ResolvedMedia(url, expected)

    async def resolve_upload(self, id: str, param: str | None = None) -> ResolvedMedia:
        """Resolve an upload of either modality.

        Raises:
            ApiError: 404, the file is missing or has another owner.
        """
        stored = await run_in_threadpool(self._store.get, id, self._owner)
        if stored is None:
            raise not_found("The file does not exist; upload it with POST /v1/files.", param)
        return ResolvedMedia(str(self._store.path(stored)), stored.file_type.modality)

    async def _upload(self, id: str, expected: Modality, param: str | None) -> ResolvedMedia:
        media = await self.resolve_upload(id, param)
        _check_modality(media.modality, expected, param)
        return media

    async def _inline(self, url: str, expected: Modality, param: str | None) -> str:
        prefix = _DATA.match(url[:_MAX_PREFIX_CHARS])
        if prefix is None:
            raise invalid_request(
                "A data: URI must have the form `data:TYPE;base64,...`, such as `data:video/mp4;base64,...`.",
                param,
            )
        if DECLARED_MODALITIES.get(prefix[1].lower()) != expected:
            types = sorted(name for name, modality in DECLARED_MODALITIES.items() if modality == expected)
            raise invalid_request(f"The type of a {expected} data: URI must be one of {', '.join(types)}.", param)
        if (len(url) - prefix.end()) // 4 * 3 > self._store.max_file_bytes + 3:
            message = "The data: URI is too large; upload it with POST /v1/files."
            raise ApiError(413, message, param=param, code="request_too_large")
        incoming = await self._stack.enter_async_context(self._store.incoming(self._owner))
        try:
            await run_in_threadpool(_decode, url, prefix.end(), incoming)
        except ValueError as error:
            raise invalid_request("The data: URI is not valid base64.", param, "invalid_base64") from error
        except ApiError as error:
            error.param = param
            raise
        _check_modality(incoming.file_type.modality, expected, param)
        return str(incoming.path)

    def _local(self, path: str, param: str | None) -> str:
        """Return the real path of a file in an allowed directory."""
        if not path.startswith("/") or "\0" in path or len(path) > 4096:
            raise _rejected(param)
        real = os.path.realpath(path)
        if not any(real.startswith(directory.rstrip("/") + "/") for directory in self._allowed_dirs):
            raise _rejected(param)
        if not os.path.isfile(real):
            raise not_found("The file does not exist.", param)
        return real


class MediaStreamingResponse(StreamingResponse):
    """Event stream that closes resources at its end, even if the client disconnects before the start.

    The `finally` block of a generator would not run if the generator never started.

    Args:
        events: Server-sent events.
        resources: Closed after the response.
        headers: Additional response headers.
    """

    def __init__(
        self, events: AsyncIterable[str], resources: AsyncExitStack, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._resources = resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._resources:
            await super().__call__(scope, receive, send)


def _decode(url: str, start: int, incoming: IncomingFile) -> None:
    for offset in range(start, len(url), _BLOCK):
        incoming.write(base64.b64decode(url[offset : offset + _BLOCK], validate=True))
    incoming.finish()


def _path_of(url: str, param: str | None) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        raise _rejected(param) from None
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise _rejected(param)
    return unquote(parts.path)


def _check_modality(actual: Modality, expected: Modality, param: str | None) -> None:
    if actual != expected:
        raise invalid_request(
            f"The file is {_NAMES[actual]}; send it as `{actual}_url` instead of `{expected}_url`.",
            param,
            "wrong_medium",
        )


_NAMES: dict[Modality, str] = {"video": "a video", "image": "an image"}


def _rejected(param: str | None) -> ApiError:
    return from_video_error(SourceNotAllowedError("", "the server cannot open this address"), param)
