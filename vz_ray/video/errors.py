"""Why a video cannot be read as asked: one class per reason, so that callers need not parse text."""

from __future__ import annotations

from vz_ray.video.frame import VideoError


class VideoNotFoundError(VideoError):
    """There is no such file."""


class VideoPermissionError(VideoError):
    """The file is there but may not be read."""


class SourceNotAllowedError(VideoError):
    """The address is of a kind that is not opened (a private host, a device, a scheme not allowed)."""


class DownloadFailedError(VideoError):
    """It is not at that address, or did not arrive, or not in time."""


class NotAVideoError(VideoError):
    """A directory, an image, sound alone, text, a playlist, or nothing at all."""


class UnsupportedCodecError(VideoError):
    """A video, but in a codec that is not on the allow-list."""


class VideoLimitExceededError(VideoError):
    """Longer, larger or more frames than the limits allow."""


class CorruptVideoError(VideoError):
    """A video in which no frame can be decoded where one was asked for."""


class InvalidFrameRequestError(VideoError):
    """The times asked for make no sense for this video."""


class FrameMismatchError(VideoError):
    """A frame decoded again is not the one its reference names; the reference must not be used."""


class DecoderDiedError(VideoError):
    """Every decode process that was given the request died of it, or before it."""


class VideoQuarantinedError(VideoError):
    """Reading it took several decode processes with it, so it is not tried any more."""


class UnexpectedReadError(VideoError):
    """Reading it failed in a way that nobody foresaw; the log has the traceback."""


class SubtitleError(VideoError):
    """A file of subtitles is missing or of another format."""
