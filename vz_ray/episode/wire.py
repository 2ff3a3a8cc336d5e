"""How an episode is written as tokens: prompt, frames, replies, errors.

Text is built from an editable `Wording`; `clean` wraps it in the model's own
chat template, `compat` in the exact strings that the released weights saw.
Tokens that were sampled are never written again: a reply is only what comes
after them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

from vz_ray.config.prompt import prompt_texts
from vz_ray.data.task import Chat
from vz_ray.episode.trajectory import MERGE, Context, Grid
from vz_ray.observe.errors import UserError
from vz_ray.video.frame import Frame
from vz_ray.video.subtitles import Subtitle, between_frames

PAD = "<|image_pad|>"
IMAGE = f"<|vision_start|>{PAD}<|vision_end|>"
END = "<|im_end|>"
SUBTITLE = "\n{text}\n"
"""A line of subtitles among frames (as the interleaved form of LongVideoBench)."""
PATCH = 14
PLACEHOLDERS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", PAD, "<|video_pad|>")
"""Tokens that stand for vision input: engines never sample them, and the learner masks the same ones."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str: ...

    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Wording:
    """The words around frames; `{frames}`, `{question}`, `{error}`, `{notice}` are filled in.

    In `frame`, they are `{number}` (from 0 in each turn), `{time}` (seconds) and `{image}`.

    Attributes:
        system: Tells the model what it may do.
        question: The first user turn.
        reply: The user turn after a good zoom.
        refusal: The user turn after a bad zoom.
        notice: Added to the reply before the last round.
        decode_refusal: The same where the clip could not be decoded.
        frame: One frame with its time.
        video: Before the frames of each video, where a question is about several; `{number}` is from 1.
        several: Added to such a question; `{count}` videos.
    """

    system: str
    question: str
    reply: str
    refusal: str
    notice: str
    # The rest may be left out of a file.
    decode_refusal: str = ""
    frame: str = "<frame{number}_time{time:.2f}s>{image}"
    video: str = "\nVideo {number}:\n"
    several: str = (
        "\nThere are {count} videos; a zoom says which: "
        '{{"video": i, "segment": [start_sec, end_sec], "fps": n}}.'
    )

    @classmethod
    def load(cls, path: Path | str) -> Wording:
        """Reads a wording file; `UserError` if it is missing or has wrong keys."""
        path, values = prompt_texts(path, cls.__slots__[:-_OPTIONAL], cls.__slots__[-_OPTIONAL:])
        wording = cls(**values)
        for key, (blanks, needed) in _BLANKS.items():
            _check_blanks(path, key, getattr(wording, key), blanks, needed)
        return wording

    @property
    def told_apart_by(self) -> list[tuple[str, str]]:
        """What makes this another wording; what is said of several videos counts where a file says it."""
        later = {field.name: field.default for field in fields(self) if field.name in ("video", "several")}
        return sorted((key, text) for key, text in asdict(self).items() if later.get(key) != text)


_OPTIONAL = 4
_BLANKS: Mapping[str, tuple[Mapping[str, object], Sequence[str]]] = {
    "question": ({"frames": "", "question": ""}, ("frames", "question")),
    "reply": ({"frames": "", "notice": ""}, ("frames",)),
    "refusal": ({"error": "", "notice": ""}, ("error",)),
    "decode_refusal": ({"error": "", "notice": ""}, ()),
    "frame": ({"number": 0, "time": 0.0, "image": ""}, ("time", "image")),
    "video": ({"number": 0}, ("number",)),
    "several": ({"count": 0}, ()),
}
"""What may be filled in, by key of the wording, and what must be."""


def _check_blanks(
    path: Path, key: str, text: str, blanks: Mapping[str, object], needed: Sequence[str]
) -> None:
    try:
        text.format(**blanks)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        known = ", ".join(f"{{{blank}}}" for blank in blanks)
        raise UserError(
            f"prompt file {path}: {key} {text!r} cannot be filled in ({error!r}); it may have {known}, "
            "and braces of its own are doubled"
        ) from error
    for blank in needed:
        if not re.search(rf"{{{blank}[:}}]", text):
            raise UserError(f"prompt file {path}: {key} {text!r} lacks {{{blank}}}")


class WireFormat:
    """Writes the conversation; one instance per model and wording, shared by all episodes."""

    def __init__(self, tokenizer: Tokenizer, wording: Wording, *, compat: bool = False) -> None:
        self.tokenizer, self.wording, self.compat = tokenizer, wording, compat
        self.pad_id = tokenizer.convert_tokens_to_ids(PAD)
        self.end_id = tokenizer.convert_tokens_to_ids(END)
        spelled = repr((compat, wording.told_apart_by, self._template("q"), self._after("r")))
        digest = hashlib.blake2s(spelled.encode(), digest_size=6).hexdigest()
        self.name = f"{'compat' if compat else 'clean'}-{digest}"

    # -- text ---------------------------------------------------------------

    def frames_text(self, frames: Sequence[Frame], subtitles: Sequence[Subtitle] = ()) -> str:
        """Each frame with its time; what was said around it stands between them."""
        between = between_frames(subtitles, [frame.pts_s for frame in frames])
        shown = [
            self.wording.frame.format(number=number, time=frame.pts_s, image=IMAGE)
            for number, frame in enumerate(frames)
        ]
        said = ["".join(SUBTITLE.format(text=line.text) for line in lines) for lines in between]
        return "".join(a + b for a, b in zip_longest(said, shown, fillvalue=""))

    def question_text(
        self,
        question: str,
        frames: Sequence[Frame],
        subtitles: Sequence[Subtitle] = (),
        pictures: Sequence[Frame] = (),
        more: Sequence[Sequence[Frame]] = (),
    ) -> str:
        """The first user turn.

        Args:
            question: What is asked.
            frames: Of the video, or of the first of several.
            subtitles: Of that video.
            pictures: Belong to the question, and follow the frames.
            more: Frames of the further videos.
        """
        shown = self.frames_text(frames, subtitles)
        if more:
            shown = "".join(
                self.video_text(k) + self.frames_text(of_one) for k, of_one in enumerate((frames, *more))
            )
            question += self.wording.several.format(count=1 + len(more))
        shown += IMAGE * len(pictures)
        return self.wording.question.format(frames=shown, question=question)

    def video_text(self, video: int) -> str:
        """What stands before the frames of one of several videos, counted from 0."""
        return self.wording.video.format(number=video + 1)

    def conversation(self, opening: str, question: str, chat: Chat) -> list[tuple[str, str]]:
        """Role and text of every message up to the policy's turn.

        Args:
            opening: The first user turn, frames and all.
            question: Of this round, without frames; where nothing was said before, it is in `opening`.
            chat: What came before; the answers stand as the policy would have given them.
        """
        system = f"{self.wording.system}\n{chat.system}" if chat.system else self.wording.system
        said = [("system", system), ("user", opening)]
        for number, (_, answer) in enumerate(chat.past):
            asked = chat.past[number + 1][0] if number + 1 < len(chat.past) else question
            said += [("assistant", f"<answer>{answer}</answer>"), ("user", asked)]
        return said

    def reply_text(
        self,
        frames: Sequence[Frame],
        *,
        last_round: bool,
        subtitles: Sequence[Subtitle] = (),
        video: int | None = None,
    ) -> str:
        """The user turn after a good zoom; `video` is which of several it looked at."""
        notice = self.wording.notice if last_round else ""
        label = "" if video is None else self.video_text(video)
        shown = label + self.frames_text(frames, subtitles)
        return self.wording.reply.format(frames=shown, notice=notice)

    def refusal_text(self, error: str, *, last_round: bool, decode: bool = False) -> str:
        wording = (
            self.wording.decode_refusal if decode and self.wording.decode_refusal else self.wording.refusal
        )
        return wording.format(error=error, notice=self.wording.notice if last_round else "")

    # -- tokens -------------------------------------------------------------

    def prompt(self, question: str, frames: Sequence[Frame]) -> Context:
        """System prompt, overview and question, up to where the policy starts."""
        return self.begun(self.conversation(self.question_text(question, frames), question, Chat()), frames)

    def begun(self, said: Sequence[tuple[str, str]], frames: Sequence[Frame]) -> Context:
        """A conversation up to where the policy starts, with `IMAGE` for each frame."""
        return self._context(self._render([{"role": role, "content": text} for role, text in said]), frames)

    def opening(self, system: str | None, text: str, frames: Sequence[Frame]) -> Context:
        """A prompt in other words, with `IMAGE` for each frame; without `system`, the template's own."""
        said = [{"role": "system", "content": system}] if system is not None else []
        return self._context(self._render([*said, {"role": "user", "content": text}]), frames)

    def reply(self, text: str, frames: Sequence[Frame], *, ended: bool) -> Context:
        """What follows a sampled turn: its end token unless it was sampled (`ended`), then a user turn."""
        after = self._after(text)
        return self._context(after.removeprefix(END) if ended else after, frames)

    def written(self, text: str) -> tuple[int, ...]:
        """Ids of a turn that was written by someone else, its end token included unless it zooms."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return tuple(ids if text.endswith("</video_zoom>") else [*ids, self.end_id])

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The turn as text, without its end token."""
        ids = token_ids[:-1] if token_ids and token_ids[-1] == self.end_id else token_ids
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    # -- parts --------------------------------------------------------------

    def _render(self, messages: list[dict[str, str]]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _template(self, question: str) -> str:
        return self._render(
            [{"role": "system", "content": self.wording.system}, {"role": "user", "content": question}]
        )

    def _after(self, text: str) -> str:
        """The rendered text between an assistant turn and the next one, from its end token on."""
        if self.compat:
            return f"{END}<|im_start|>user\n{text}{END}\n<|im_start|>assistant\n"
        mark = "\u2042"
        before = [{"role": "user", "content": "-"}, {"role": "assistant", "content": mark}]
        return self._render([*before, {"role": "user", "content": text}]).split(mark, 1)[1]

    def _context(self, text: str, frames: Sequence[Frame]) -> Context:
        compact = self.tokenizer.encode(text, add_special_tokens=False)
        pads = compact.count(self.pad_id)
        if pads != len(frames):
            raise UserError(f"{pads} image slots for {len(frames)} frames: the text itself contains {PAD}")
        grids = tuple(grid_of(frame) for frame in frames)
        return Context(tuple(compact), grids, tuple(frame.ref for frame in frames), self.pad_id)


def placeholder_ids(vocabulary: Mapping[str, int]) -> tuple[int, ...]:
    """Ids of the placeholders that a tokenizer knows, ascending."""
    return tuple(sorted(vocabulary[token] for token in PLACEHOLDERS if token in vocabulary))


def grid_of(frame: Frame) -> Grid:
    """Patch grid of a frame at its final size."""
    height, width = frame.rgb.shape[:2]
    side = PATCH * MERGE
    if height % side or width % side:
        raise ValueError(
            f"a frame of {width}x{height} is not a multiple of {side} px: it was not resized for the model"
        )
    return (1, height // PATCH, width // PATCH)
