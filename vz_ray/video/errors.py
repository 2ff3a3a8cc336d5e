"""Video errors, one class per cause."""

from __future__ import annotations


class VideoError(Exception):
    """A video cannot be read.

    `str(error)` names the file and is meant for users. `model_message` is short, contains no path,
    and can be shown to the model in an error turn; each class has a default.
    """

    model_message = "the video could not be read"

    def __init__(self, message: str, model_message: str = "") -> None:
        super().__init__(message)
        self.model_message = model_message or type(self).model_message

    def __reduce__(self) -> tuple[type[VideoError], tuple[str, str]]:
        return (type(self), (str(self), self.model_message))


class VideoNotFoundError(VideoError):
    """The file does not exist."""

    model_message = "the video is missing"


class VideoPermissionError(VideoError):
    """The file exists, but read permission is missing."""

    model_message = "the video is locked"


class SourceNotAllowedError(VideoError):
    """The source is not allowed: a private host, a device, or another URL scheme."""

    model_message = "the video's address cannot be opened"


class DownloadFailedError(VideoError):
    """The download failed or timed out."""

    model_message = "the video could not be fetched"


class NotAVideoError(VideoError):
    """The file has no video: a directory, an image, audio, text, a playlist, or an empty file."""

    model_message = "the file is not a video that can be read"


class UnsupportedCodecError(VideoError):
    """The codec is not on the allow-list."""

    model_message = "the video's codec is not supported"


class VideoLimitExceededError(VideoError):
    """The duration, resolution, file size or number of frames exceeds a limit."""


class CorruptVideoError(VideoError):
    """No frame can be decoded at the requested time."""

    model_message = "this part of the video is damaged"


class InvalidFrameRequestError(VideoError):
    """The requested times or rates are invalid for this video."""


class FrameMismatchError(VideoError):
    """A frame decoded by reference has other bytes than the reference."""

    model_message = "a frame shown earlier cannot be shown again"


class DecoderDiedError(VideoError):
    """The decoder died at every attempt."""


class VideoQuarantinedError(VideoError):
    """The video killed several decoders and is rejected."""


class UnexpectedReadError(VideoError):
    """Reading raised an unexpected exception; the log has the traceback."""


class SubtitleError(VideoError):
    """The subtitle file is missing or has an unknown format."""

    model_message = "the video's subtitles cannot be read"
