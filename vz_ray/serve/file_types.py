"""Detect the type of a file from its first bytes.

Only types that the decoders support are known. Text formats are not: playlists (m3u8, mpd, ffconcat, svg)
could make a decoder open other files, so they are rejected before decoding. A valid header does not imply a
readable file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Modality = Literal["video", "image"]

HEADER_BYTES = 512
"""Number of bytes that are inspected."""
_TS_PACKET = 188
_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"})
"""Possible first boxes of a file of the MP4 family."""
_IMAGE_BRANDS = frozenset({b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"})


@dataclass(frozen=True, slots=True)
class FileType:
    """A file type that the decoders support.

    Attributes:
        modality: `video` or `image`.
        suffix: Suffix of stored files.
        content_type: MIME type.
    """

    modality: Modality
    suffix: str
    content_type: str


MP4 = FileType("video", ".mp4", "video/mp4")
MATROSKA = FileType("video", ".mkv", "video/x-matroska")
WEBM = FileType("video", ".webm", "video/webm")
AVI = FileType("video", ".avi", "video/x-msvideo")
MPEG_TS = FileType("video", ".ts", "video/mp2t")
MPEG_PS = FileType("video", ".mpg", "video/mpeg")
FLV = FileType("video", ".flv", "video/x-flv")
PNG = FileType("image", ".png", "image/png")
JPEG = FileType("image", ".jpg", "image/jpeg")
WEBP = FileType("image", ".webp", "image/webp")
BMP = FileType("image", ".bmp", "image/bmp")

FILE_TYPES = (MP4, MATROSKA, WEBM, AVI, MPEG_TS, MPEG_PS, FLV, PNG, JPEG, WEBP, BMP)

_STARTS = {
    b"\x89PNG\r\n\x1a\n": PNG,
    b"\xff\xd8\xff": JPEG,
    b"FLV\x01": FLV,
    b"\x00\x00\x01\xba": MPEG_PS,
}
DECLARED_MODALITIES: dict[str, Modality] = {
    **{kind.content_type: kind.modality for kind in FILE_TYPES},
    "image/jpg": "image",
    "video/quicktime": "video",
    "video/3gpp": "video",
    "video/x-m4v": "video",
    "video/avi": "video",
}
"""Modality by MIME type, for `data:` URIs."""


def detect_file_type(head: bytes) -> FileType | None:
    """Return the type of a file from its first `HEADER_BYTES` bytes; None if it is not supported."""
    for start, kind in _STARTS.items():
        if head.startswith(start):
            return kind
    if head[:4] == b"RIFF":
        return {b"AVI ": AVI, b"WEBP": WEBP}.get(head[8:12])
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return WEBM if b"webm" in head[:64] else MATROSKA
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return BMP
    if head[4:8] in _BOXES:
        return None if head[4:8] == b"ftyp" and head[8:12] in _IMAGE_BRANDS else MP4
    for offset in (0, 4):  # plain, and with a 4-byte timestamp before each packet (M2TS)
        step = _TS_PACKET + offset
        if len(head) > offset + step and head[offset] == head[offset + step] == 0x47:
            return MPEG_TS
    return None


def file_type_of_suffix(suffix: str) -> FileType:
    """Return the type of stored files with a suffix; raises KeyError if it is unknown."""
    return {kind.suffix: kind for kind in FILE_TYPES}[suffix]
