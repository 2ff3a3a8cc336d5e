"""From what a request calls a video or image to what the decoders open.

    file-...            an upload of the same key
    data:video/mp4;...  sent inline: written to the store, deleted when the request ends
    https://...         fetched by the decoders, which also vet the addresses behind it
    /path, file:///...  inside `files.allowed_dirs`, links followed

Everything else is refused. A refusal does not say what is on the server's disk.
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

from vz_ray.serve.api_errors import ApiError, from_video_error, invalid_request, not_found, too_large
from vz_ray.serve.file_store import FileStore, IncomingFile
from vz_ray.serve.file_types import DECLARED_MODALITIES, Modality
from vz_ray.video.errors import SourceNotAllowedError
from vz_ray.video.remote import DownloadRules, check_url

_DATA = re.compile(r"data:([a-z0-9.+-]+/[a-z0-9.+-]+)(?:;[a-z0-9=\"._-]+)*;base64,", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_BLOCK = 4 * 2**18
"""Characters of base64 that are decoded at a time."""
_MOST = 64
"""Videos and images in one request."""
_LONGEST_HEAD = 256


@dataclass(frozen=True, slots=True)
class ResolvedMedia:
    """What the decoders open.

    Attributes:
        uri: A URL or a path.
        modality: An image is asked for as a `ImageRequest`, since its name may not end like an image's.
    """

    uri: str
    modality: Modality


class MediaResolver:
    """The videos and images of one request; what was sent inline is gone after the block.

    Args:
        store: Uploads, and where inline media lie meanwhile.
        owner: Whose request it is.
        rules: Which URLs are fetched; those of the clip pool.
        roots: Directories in which files may be named by their paths; none refuses paths.

    Example:
        async with Media(store, owner(request), rules, config.files.roots) as media:
            source = await media.resolve(part.video_url.url, "video", param="messages.0.content.1")
    """

    def __init__(self, store: FileStore, owner: str, rules: DownloadRules, roots: Sequence[str] = ()) -> None:
        self._store, self._owner, self._rules = store, owner, rules
        self._roots = tuple(os.path.realpath(root) for root in roots)
        self._stack, self._found = AsyncExitStack(), 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def resolve(self, url: str, kind: Modality, param: str | None = None) -> ResolvedMedia:
        """What `url` stands for.

        Args:
            url: As the request has it.
            kind: What the request takes it for.
            param: Where it stands, for the refusal.

        Raises:
            ApiError: 400, 404 (a file that is not this owner's), 413 or 507.
        """
        self._found += 1
        if self._found > _MOST:
            raise invalid_request(f"A request may have {_MOST} videos and images.", param, "too_many_media")
        scheme = _SCHEME.match(url[:64])
        if url.startswith("file-"):
            return await self._upload(url, kind, param)
        if scheme is None:
            return ResolvedMedia(await run_in_threadpool(self._local, url, param), kind)
        if scheme[0].lower() == "data:":
            return ResolvedMedia(await self._inline(url, kind, param), kind)
        if scheme[0].lower() == "file:":
            return ResolvedMedia(await run_in_threadpool(self._local, _path_of(url, param), param), kind)
        try:
            check_url(url, self._rules)
        except SourceNotAllowedError as error:
            raise _refused(param) from error
        return ResolvedMedia(url, kind)

    async def resolve_upload(self, id: str, param: str | None = None) -> ResolvedMedia:
        """The upload `id`, whichever medium it is.

        Raises:
            ApiError: 404, where it is not there or not this owner's.
        """
        stored = await run_in_threadpool(self._store.get, id, self._owner)
        if stored is None:
            raise not_found("There is no such file; upload it with POST /v1/files.", param)
        return ResolvedMedia(str(self._store.path(stored)), stored.file_type.modality)

    async def _upload(self, id: str, kind: Modality, param: str | None) -> ResolvedMedia:
        found = await self.resolve_upload(id, param)
        _check_medium(found.modality, kind, param)
        return found

    async def _inline(self, url: str, kind: Modality, param: str | None) -> str:
        head = _DATA.match(url[:_LONGEST_HEAD])
        if head is None:
            raise invalid_request(
                "A data: URI must read `data:TYPE;base64,...`, such as `data:video/mp4;base64,...`.", param
            )
        if DECLARED_MODALITIES.get(head[1].lower()) != kind:
            types = ", ".join(sorted(name for name, medium in DECLARED_MODALITIES.items() if medium == kind))
            raise invalid_request(f"A data: URI of this {kind} must be one of {types}.", param)
        if (len(url) - head.end()) // 4 * 3 > self._store.max_file_bytes + 3:
            raise too_large("The data: URI is too large; upload it with POST /v1/files.", param)
        incoming = await self._stack.enter_async_context(self._store.incoming(self._owner))
        try:
            await run_in_threadpool(_decode, url, head.end(), incoming)
        except ValueError as error:
            raise invalid_request("The data: URI is not valid base64.", param, "invalid_base64") from error
        except ApiError as error:
            error.param = param
            raise
        _check_medium(incoming.file_type.modality, kind, param)
        return str(incoming.path)

    def _local(self, path: str, param: str | None) -> str:
        """The real path of a file inside the roots."""
        if not path.startswith("/") or "\0" in path or len(path) > 4096:
            raise _refused(param)
        real = os.path.realpath(path)
        if not any(real.startswith(root.rstrip("/") + "/") for root in self._roots):
            raise _refused(param)
        if not os.path.isfile(real):
            raise not_found("There is no such file.", param)
        return real


class MediaStreamingResponse(StreamingResponse):
    """A stream for which media are kept; they are gone after it, also if the client left before it began.

    What a generator does at its end it does only if it was begun.

    Args:
        events: What is sent.
        kept: Closed at the end.
        headers: Further headers of the response.
    """

    def __init__(
        self, events: AsyncIterable[str], kept: AsyncExitStack, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._kept = kept

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._kept:
            await super().__call__(scope, receive, send)


def _decode(url: str, start: int, incoming: IncomingFile) -> None:
    for place in range(start, len(url), _BLOCK):
        incoming.write(base64.b64decode(url[place : place + _BLOCK], validate=True))
    incoming.finish()


def _path_of(url: str, param: str | None) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        raise _refused(param) from None
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise _refused(param)
    return unquote(parts.path)


def _check_medium(found: Modality, wanted: Modality, param: str | None) -> None:
    if found != wanted:
        raise invalid_request(
            f"This is {_NAMES[found]}; send it as `{found}_url`, not `{wanted}_url`.", param, "wrong_medium"
        )


_NAMES: dict[Modality, str] = {"video": "a video", "image": "an image"}


def _refused(param: str | None) -> ApiError:
    return from_video_error(SourceNotAllowedError("", "this address cannot be opened by the server"), param)
