"""Encode an episode as tokens: prompt, frames, observations, errors.

Texts come from an editable `PromptTemplate`. `clean` wraps them in the model's chat template, `compat`
in the exact strings of the released weights. Sampled tokens are never re-encoded: an observation
contains only the tokens after them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, Protocol

from vz_ray.env.prompt_template import PromptTemplate
from vz_ray.env.task import ChatHistory
from vz_ray.env.trajectory import TokenContext
from vz_ray.env.zoom_call import REASONING_CLOSE, REASONING_OPEN
from vz_ray.utils.errors import UserError
from vz_ray.video.frame import Frame
from vz_ray.video.image_grid import ImageGrid
from vz_ray.video.subtitles import Subtitle, between_frames

IMAGE_PAD = "<|image_pad|>"
IMAGE_SLOT = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"
END_OF_TURN = "<|im_end|>"
_ASSISTANT_START = "<|im_start|>assistant\n"
SUBTITLE_LINE = "\n{text}\n"
"""Subtitle line between frames, as in the interleaved format of LongVideoBench."""
VISION_PLACEHOLDERS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE_PAD, "<|video_pad|>")
"""Placeholder tokens of vision input. Engines never sample them, and the learner masks the same ids."""


class Tokenizer(Protocol):
    """Required interface of a Hugging Face tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str: ...

    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    def get_added_vocab(self) -> Mapping[str, int]: ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any: ...


class ChatFormat:
    """Encoder of conversations for one model and prompt template, shared by all episodes.

    Args:
        grid: Grid of the checkpoint's frames.
        frame_text: Text of a frame if the template has none.
        compat: Use the exact strings of the released weights instead of the chat template.
        thinking: `on` or `off` sets the chat template's `enable_thinking`; `auto` leaves its default.

    Attributes:
        template: The template, with the text of a frame.
        name: `clean` or `compat`, and a hash of everything that affects the encoding.
        pad_id: Token id of the image pad.
        end_id: Token id of the end of a turn.
        turn_prefix: Text that the chat template puts before each turn of the policy: `<think>`, an empty
            block, or nothing.
        opens_reasoning: Whether `turn_prefix` opens a block. It is then part of the turn's text, and the
            policy must close the block before a zoom call or an answer.

    Raises:
        UserError: Neither `template` nor `frame_text` has the text of a frame.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: PromptTemplate,
        *,
        grid: ImageGrid,
        frame_text: str = "",
        compat: bool = False,
        thinking: str = "auto",
    ) -> None:
        template = replace(template, frame=template.frame or frame_text)
        if not template.frame:
            raise UserError("the prompt file has no key frame, and the model family recommends no text. Set frame.")
        self.tokenizer, self.template, self.grid, self.compat = tokenizer, template, grid, compat
        self._template_options = {} if thinking == "auto" else {"enable_thinking": thinking == "on"}
        self.pad_id = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        self.end_id = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        prompt = self._render([{"role": "system", "content": template.system}, {"role": "user", "content": "q"}])
        self.turn_prefix = prompt.rpartition(_ASSISTANT_START)[2] if _ASSISTANT_START in prompt else ""
        self.opens_reasoning = REASONING_OPEN in self.turn_prefix and REASONING_CLOSE not in self.turn_prefix
        identity = repr((compat, template.fingerprint_items, prompt, self._render_user_turn("r")))
        digest = hashlib.blake2s(identity.encode(), digest_size=6).hexdigest()
        self.name = f"{'compat' if compat else 'clean'}-{digest}"

    # -- text ---------------------------------------------------------------

    def format_frames(self, frames: Sequence[Frame], subtitles: Sequence[Subtitle] = ()) -> str:
        """Format frames with their times, and subtitle lines between them."""
        lines_between = between_frames(subtitles, [frame.pts_s for frame in frames])
        frame_texts = [
            self.template.frame.format(number=number, time=frame.pts_s, image=IMAGE_SLOT)
            for number, frame in enumerate(frames)
        ]
        subtitle_texts = ["".join(SUBTITLE_LINE.format(text=line.text) for line in lines) for lines in lines_between]
        return "".join(subtitle + frame for subtitle, frame in zip_longest(subtitle_texts, frame_texts, fillvalue=""))

    def format_question(
        self,
        question: str,
        frames: Sequence[Frame],
        subtitles: Sequence[Subtitle] = (),
        question_images: Sequence[Frame] = (),
        extra_frames: Sequence[Sequence[Frame]] = (),
    ) -> str:
        """Format the first user turn. Question images follow the overviews.

        `frames` and `subtitles` belong to the first video; `extra_frames` are the overviews of the others.
        """
        frames_text = self.format_frames(frames, subtitles)
        if extra_frames:
            frames_text = "".join(
                self.format_video_label(index) + self.format_frames(video_frames)
                for index, video_frames in enumerate((frames, *extra_frames))
            )
            question += self.template.several.format(count=1 + len(extra_frames))
        frames_text += IMAGE_SLOT * len(question_images)
        return self.template.question.format(frames=frames_text, question=question)

    def format_video_label(self, video: int) -> str:
        """Format the label of one of several videos; `video` counts from 0."""
        return self.template.video.format(number=video + 1)

    def build_messages(self, opening: str, question: str, chat: ChatHistory) -> list[tuple[str, str]]:
        """Build the role and text of every message before the policy's turn.

        Args:
            opening: First user turn, including frames.
            question: Question of this round, without frames. Unused without a chat history, because then
                `opening` contains it.
            chat: Earlier rounds. Answers are formatted as the policy's.
        """
        system = f"{self.template.system}\n{chat.system}" if chat.system else self.template.system
        messages = [("system", system), ("user", opening)]
        next_questions = [*(next_question for next_question, _ in chat.turns[1:]), question]
        for (_, answer), next_question in zip(chat.turns, next_questions, strict=False):
            messages += [("assistant", f"<answer>{answer}</answer>"), ("user", next_question)]
        return messages

    def format_clip(
        self,
        frames: Sequence[Frame],
        *,
        last_round: bool,
        subtitles: Sequence[Subtitle] = (),
        video: int | None = None,
    ) -> str:
        """Format the user turn after an executed zoom. `video` is the index if there are several videos."""
        notice = self.template.notice if last_round else ""
        label = "" if video is None else self.format_video_label(video)
        frames_text = label + self.format_frames(frames, subtitles)
        return self.template.reply.format(frames=frames_text, notice=notice)

    def format_error(self, error: str, *, last_round: bool, decode: bool = False) -> str:
        """Format the user turn after a rejected zoom; with `decode`, after a decode error."""
        text = self.template.decode_refusal if decode and self.template.decode_refusal else self.template.refusal
        return text.format(error=error, notice=self.template.notice if last_round else "")

    # -- tokens -------------------------------------------------------------

    def encode_prompt(self, question: str, frames: Sequence[Frame]) -> TokenContext:
        """Encode system prompt, overview and question, up to the start of the policy's turn."""
        return self.encode_messages(
            self.build_messages(self.format_question(question, frames), question, ChatHistory()), frames
        )

    def encode_messages(self, messages: Sequence[tuple[str, str]], frames: Sequence[Frame]) -> TokenContext:
        """Encode messages with an `IMAGE_SLOT` per frame, up to the start of the policy's turn.

        Without a system message, the chat template's default applies.
        """
        return self._encode(self._render([{"role": role, "content": text} for role, text in messages]), frames)

    def encode_observation(self, text: str, frames: Sequence[Frame], *, end_sampled: bool) -> TokenContext:
        """Encode the user turn after an assistant turn.

        Include the assistant's end token unless it was sampled (`end_sampled`).
        """
        rendered = self._render_user_turn(text)
        return self._encode(rendered.removeprefix(END_OF_TURN) if end_sampled else rendered, frames)

    def encode_assistant(self, text: str) -> tuple[int, ...]:
        """Encode an external turn, with the end token unless it ends with a zoom call."""
        ids = self.tokenizer.encode(self.strip_turn_prefix(text), add_special_tokens=False)
        return tuple(ids if text.endswith("</video_zoom>") else [*ids, self.end_id])

    def strip_turn_prefix(self, text: str) -> str:
        """Return the part of a turn's text that follows `turn_prefix`, which the prompt contains.

        If the prompt opens the reasoning and the text has none, the reasoning is empty.
        """
        if text.startswith(self.turn_prefix):
            return text[len(self.turn_prefix) :]
        if not self.opens_reasoning:
            return text
        if text.lstrip().startswith(REASONING_OPEN):
            return text.lstrip()[len(REASONING_OPEN) :].lstrip("\n")
        return f"\n{REASONING_CLOSE}\n\n{text}"

    def decode_turn(self, token_ids: Sequence[int]) -> str:
        """Decode a turn without its end token. Reasoning that the prompt opened is complete."""
        ids = token_ids[:-1] if token_ids and token_ids[-1] == self.end_id else token_ids
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return self.turn_prefix + text if self.opens_reasoning else text

    # -- implementation -----------------------------------------------------

    def _render(self, messages: list[dict[str, str]]) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self._template_options
            )
        )

    def _render_user_turn(self, text: str) -> str:
        """Render the text between two assistant turns, starting with the end token of the first."""
        if self.compat:
            return f"{END_OF_TURN}<|im_start|>user\n{text}{END_OF_TURN}\n<|im_start|>assistant\n"
        marker = "\u2042"
        previous = [{"role": "user", "content": "-"}, {"role": "assistant", "content": marker}]
        return self._render([*previous, {"role": "user", "content": text}]).split(marker, 1)[1]

    def _encode(self, text: str, frames: Sequence[Frame]) -> TokenContext:
        compact = self.tokenizer.encode(text, add_special_tokens=False)
        pads = compact.count(self.pad_id)
        if pads != len(frames):
            raise UserError(f"{pads} image slots for {len(frames)} frames: the text itself contains {IMAGE_PAD}")
        grids = tuple(self.grid.patch_grid(*frame.rgb.shape[:2]) for frame in frames)
        refs = tuple(frame.ref for frame in frames)
        return TokenContext(tuple(compact), grids, refs, self.pad_id, self.grid.merge_size)


def vision_placeholder_ids(vocabulary: Mapping[str, int]) -> tuple[int, ...]:
    """Return the ids of the vision placeholders in a vocabulary, ascending."""
    return tuple(sorted(vocabulary[token] for token in VISION_PLACEHOLDERS if token in vocabulary))
