"""How an episode is written as tokens: prompt, frames, replies, errors.

Text is built from an editable `PromptTemplate`; `clean` wraps it in the model's own
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

from vz_ray.config.prompt_file import load_prompt_file
from vz_ray.env.task import ChatHistory
from vz_ray.env.trajectory import MERGE_SIZE, Grid, TokenContext
from vz_ray.utils.errors import UserError
from vz_ray.video.frame import Frame
from vz_ray.video.subtitles import Subtitle, between_frames

IMAGE_PAD = "<|image_pad|>"
IMAGE_SLOT = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"
END_OF_TURN = "<|im_end|>"
SUBTITLE_LINE = "\n{text}\n"
"""A line of subtitles among frames (as the interleaved form of LongVideoBench)."""
PATCH_SIZE = 14
VISION_PLACEHOLDERS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE_PAD, "<|video_pad|>")
"""Tokens that stand for vision input: engines never sample them, and the learner masks the same ones."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str: ...

    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class PromptTemplate:
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
    def load(cls, path: Path | str) -> PromptTemplate:
        """Reads a wording file; `UserError` if it is missing or has wrong keys."""
        path, values = load_prompt_file(path, cls.__slots__[:-_NUM_OPTIONAL], cls.__slots__[-_NUM_OPTIONAL:])
        wording = cls(**values)
        for key, (blanks, needed) in _TEMPLATE_FIELDS.items():
            _check_template_fields(path, key, getattr(wording, key), blanks, needed)
        return wording

    @property
    def fingerprint_items(self) -> list[tuple[str, str]]:
        """What makes this another wording; what is said of several videos counts where a file says it."""
        later = {field.name: field.default for field in fields(self) if field.name in ("video", "several")}
        return sorted((key, text) for key, text in asdict(self).items() if later.get(key) != text)


_NUM_OPTIONAL = 4
_TEMPLATE_FIELDS: Mapping[str, tuple[Mapping[str, object], Sequence[str]]] = {
    "question": ({"frames": "", "question": ""}, ("frames", "question")),
    "reply": ({"frames": "", "notice": ""}, ("frames",)),
    "refusal": ({"error": "", "notice": ""}, ("error",)),
    "decode_refusal": ({"error": "", "notice": ""}, ()),
    "frame": ({"number": 0, "time": 0.0, "image": ""}, ("time", "image")),
    "video": ({"number": 0}, ("number",)),
    "several": ({"count": 0}, ()),
}
"""What may be filled in, by key of the wording, and what must be."""


def _check_template_fields(
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


class ChatFormat:
    """Writes the conversation; one instance per model and wording, shared by all episodes."""

    def __init__(self, tokenizer: Tokenizer, template: PromptTemplate, *, compat: bool = False) -> None:
        self.tokenizer, self.template, self.compat = tokenizer, template, compat
        self.pad_id = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        self.end_id = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        spelled = repr(
            (compat, template.fingerprint_items, self._render_prompt("q"), self._render_user_turn("r"))
        )
        digest = hashlib.blake2s(spelled.encode(), digest_size=6).hexdigest()
        self.name = f"{'compat' if compat else 'clean'}-{digest}"

    # -- text ---------------------------------------------------------------

    def format_frames(self, frames: Sequence[Frame], subtitles: Sequence[Subtitle] = ()) -> str:
        """Each frame with its time; what was said around it stands between them."""
        between = between_frames(subtitles, [frame.pts_s for frame in frames])
        shown = [
            self.template.frame.format(number=number, time=frame.pts_s, image=IMAGE_SLOT)
            for number, frame in enumerate(frames)
        ]
        said = ["".join(SUBTITLE_LINE.format(text=line.text) for line in lines) for lines in between]
        return "".join(a + b for a, b in zip_longest(said, shown, fillvalue=""))

    def format_question(
        self,
        question: str,
        frames: Sequence[Frame],
        subtitles: Sequence[Subtitle] = (),
        question_images: Sequence[Frame] = (),
        extra_frames: Sequence[Sequence[Frame]] = (),
    ) -> str:
        """The first user turn.

        Args:
            question: What is asked.
            frames: Of the video, or of the first of several.
            subtitles: Of that video.
            question_images: Belong to the question, and follow the frames.
            extra_frames: Frames of the further videos.
        """
        shown = self.format_frames(frames, subtitles)
        if extra_frames:
            shown = "".join(
                self.format_video_label(k) + self.format_frames(of_one)
                for k, of_one in enumerate((frames, *extra_frames))
            )
            question += self.template.several.format(count=1 + len(extra_frames))
        shown += IMAGE_SLOT * len(question_images)
        return self.template.question.format(frames=shown, question=question)

    def format_video_label(self, video: int) -> str:
        """What stands before the frames of one of several videos, counted from 0."""
        return self.template.video.format(number=video + 1)

    def build_messages(self, opening: str, question: str, chat: ChatHistory) -> list[tuple[str, str]]:
        """Role and text of every message up to the policy's turn.

        Args:
            encode_opening: The first user turn, frames and all.
            question: Of this round, without frames; where nothing was said before, it is in `encode_opening`.
            chat: What came before; the answers stand as the policy would have given them.
        """
        system = f"{self.template.system}\n{chat.system}" if chat.system else self.template.system
        said = [("system", system), ("user", opening)]
        for number, (_, answer) in enumerate(chat.turns):
            asked = chat.turns[number + 1][0] if number + 1 < len(chat.turns) else question
            said += [("assistant", f"<answer>{answer}</answer>"), ("user", asked)]
        return said

    def format_clip(
        self,
        frames: Sequence[Frame],
        *,
        last_round: bool,
        subtitles: Sequence[Subtitle] = (),
        video: int | None = None,
    ) -> str:
        """The user turn after a good zoom; `video` is which of several it looked at."""
        notice = self.template.notice if last_round else ""
        label = "" if video is None else self.format_video_label(video)
        shown = label + self.format_frames(frames, subtitles)
        return self.template.reply.format(frames=shown, notice=notice)

    def format_error(self, error: str, *, last_round: bool, decode: bool = False) -> str:
        wording = (
            self.template.decode_refusal if decode and self.template.decode_refusal else self.template.refusal
        )
        return wording.format(error=error, notice=self.template.notice if last_round else "")

    # -- tokens -------------------------------------------------------------

    def encode_prompt(self, question: str, frames: Sequence[Frame]) -> TokenContext:
        """System prompt, overview and question, up to where the policy starts."""
        return self.encode_messages(
            self.build_messages(self.format_question(question, frames), question, ChatHistory()), frames
        )

    def encode_messages(self, said: Sequence[tuple[str, str]], frames: Sequence[Frame]) -> TokenContext:
        """A conversation up to where the policy starts, with `IMAGE_SLOT` for each frame."""
        return self._encode(self._render([{"role": role, "content": text} for role, text in said]), frames)

    def encode_opening(self, system: str | None, text: str, frames: Sequence[Frame]) -> TokenContext:
        """A prompt in other words, with `IMAGE_SLOT` for each frame; without `system`, the template's own."""
        said = [{"role": "system", "content": system}] if system is not None else []
        return self._encode(self._render([*said, {"role": "user", "content": text}]), frames)

    def encode_observation(self, text: str, frames: Sequence[Frame], *, end_sampled: bool) -> TokenContext:
        """Encode the user turn after an assistant turn. `end_sampled`: its end token was sampled."""
        after = self._render_user_turn(text)
        return self._encode(after.removeprefix(END_OF_TURN) if end_sampled else after, frames)

    def encode_assistant(self, text: str) -> tuple[int, ...]:
        """Ids of a turn that was written by someone else, its end token included unless it zooms."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return tuple(ids if text.endswith("</video_zoom>") else [*ids, self.end_id])

    def decode_turn(self, token_ids: Sequence[int]) -> str:
        """The turn as text, without its end token."""
        ids = token_ids[:-1] if token_ids and token_ids[-1] == self.end_id else token_ids
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    # -- parts --------------------------------------------------------------

    def _render(self, messages: list[dict[str, str]]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _render_prompt(self, question: str) -> str:
        return self._render(
            [{"role": "system", "content": self.template.system}, {"role": "user", "content": question}]
        )

    def _render_user_turn(self, text: str) -> str:
        """The rendered text between an assistant turn and the next one, from its end token on."""
        if self.compat:
            return f"{END_OF_TURN}<|im_start|>user\n{text}{END_OF_TURN}\n<|im_start|>assistant\n"
        mark = "\u2042"
        before = [{"role": "user", "content": "-"}, {"role": "assistant", "content": mark}]
        return self._render([*before, {"role": "user", "content": text}]).split(mark, 1)[1]

    def _encode(self, text: str, frames: Sequence[Frame]) -> TokenContext:
        compact = self.tokenizer.encode(text, add_special_tokens=False)
        pads = compact.count(self.pad_id)
        if pads != len(frames):
            raise UserError(
                f"{pads} image slots for {len(frames)} frames: the text itself contains {IMAGE_PAD}"
            )
        grids = tuple(patch_grid(frame) for frame in frames)
        return TokenContext(tuple(compact), grids, tuple(frame.ref for frame in frames), self.pad_id)


def vision_placeholder_ids(vocabulary: Mapping[str, int]) -> tuple[int, ...]:
    """Ids of the placeholders that a tokenizer knows, ascending."""
    return tuple(sorted(vocabulary[token] for token in VISION_PLACEHOLDERS if token in vocabulary))


def patch_grid(frame: Frame) -> Grid:
    """Patch grid of a frame at its final size."""
    height, width = frame.rgb.shape[:2]
    side = PATCH_SIZE * MERGE_SIZE
    if height % side or width % side:
        raise ValueError(
            f"a frame of {width}x{height} is not a multiple of {side} px: it was not resized for the model"
        )
    return (1, height // PATCH_SIZE, width // PATCH_SIZE)
