"""Trajectories in the SFT layout that common tools read, and back.

    [{"messages": [{"role": "system", "content": ...},
                   {"role": "user", "content": "<frame0_time0.00s><image>... What is shown?"},
                   {"role": "assistant", "content": "<think>...</think><video_zoom>...</video_zoom>"}, ...],
      "images": ["images/0a/0a1b.png", ...]}]

One `<image>` in a message for each frame, in the order of `images`, whose paths
are relative to the file; a record on each line does as well as a list of them.
An assistant's message that is not to be learned from has `"weight": 0`, as in
OpenAI's own fine-tuning files.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from vz_ray.env.chat_format import IMAGE_SLOT, VISION_PLACEHOLDERS, ChatFormat
from vz_ray.env.protocols import FrameSource
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, ExternalAction, TokenContext, Trajectory, Turn
from vz_ray.env.zoom_call import extract_answer, parse_turn
from vz_ray.utils.errors import UserError
from vz_ray.video.frame import Frame, FrameRef, FrameSize, OverviewRequest, VideoError

IMAGE_MARKER = "<image>"
_MESSAGE = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
_ROLES = ("system", "user", "assistant")
_CONTROL = (*VISION_PLACEHOLDERS, "<|im_start|>", "<|im_end|>")


class SampleEncodingError(ValueError):
    """A trajectory cannot be written in this layout: its text has a mark that stands for a frame."""


def trajectory_to_sample(
    trajectory: Trajectory,
    wire: ChatFormat,
    path_of: Callable[[FrameRef], str],
    *,
    num_context_turns: int = 0,
) -> dict[str, Any]:
    """A trajectory in the layout.

    Args:
        trajectory: Played under `wire`.
        wire: Its tokenizer.
        path_of: Where the image of a frame lies.
        num_context_turns: First turns that are not to be learned from.

    Raises:
        NotWritable: A text holds `<image>`, or marks and frames do not match.
    """
    messages: list[dict[str, Any]] = []
    turns = 0
    for role, text in _MESSAGE.findall(_spelled(trajectory, wire)):
        if IMAGE_MARKER in text:
            raise SampleEncodingError(
                f"trajectory {trajectory.id}: a message holds {IMAGE_MARKER}, which stands for a frame"
            )
        message: dict[str, Any] = {"role": role, "content": text.replace(IMAGE_SLOT, IMAGE_MARKER)}
        if role == "assistant":
            turns += 1
            message |= {"weight": 0} if turns <= num_context_turns else {}
        messages.append(message)
    images = [path_of(ref) for ref in trajectory.frame_refs]
    marks = sum(message["content"].count(IMAGE_MARKER) for message in messages)
    if marks != len(images) or turns != len(trajectory.turns):
        raise SampleEncodingError(
            f"trajectory {trajectory.id}: {marks} marks for {len(images)} frames, and {turns} assistant "
            f"messages for {len(trajectory.turns)} turns"
        )
    return {"messages": messages, "images": images}


def _spelled(trajectory: Trajectory, wire: ChatFormat) -> str:
    """The whole conversation as text, one pad per frame."""
    ids = list(trajectory.prompt.compact_ids)
    for turn in trajectory.turns:
        ids += [*turn.action.token_ids, *(turn.observation.compact_ids if turn.observation else ())]
    return wire.tokenizer.decode(ids, skip_special_tokens=False)


@dataclass(frozen=True, slots=True)
class _SftMessage:
    """A message, and how many frames it shows."""

    role: str
    text: str
    images: int
    learned: bool


def sample_to_trajectory(
    sample: Mapping[str, Any], frames: Sequence[Frame], wire: ChatFormat, name: str
) -> Trajectory:
    """A sample of the layout as a trajectory to learn from.

    Turns of weight 0 become part of what the policy reads: of the prompt, or of
    the reply before the next turn.

    Args:
        sample: One record.
        frames: Its images, in order.
        wire: Of the policy that is to learn from it.
        name: Its id; unique in its file.

    Raises:
        ValueError: It is not of the layout; says what is wrong.
    """
    system, said = _conversation(sample)
    shown = iter(frames)

    def own(message: _SftMessage) -> list[Frame]:
        return list(islice(shown, message.images))

    context = wire.encode_opening(system, said[0].text, own(said[0]))
    prompt: TokenContext | None = None
    turns: list[Turn] = []
    for answer, asked in zip(said[1::2], [*said[2::2], None], strict=True):
        ids = wire.encode_assistant(answer.text)
        ended = ids[-1] == wire.end_id
        reply = None if asked is None else wire.encode_observation(asked.text, own(asked), end_sampled=ended)
        if not answer.learned:
            context = _joined(context, TokenContext(ids, pad_id=wire.pad_id), reply)
            continue
        if prompt is None:
            prompt = context
        else:
            turns[-1] = replace(turns[-1], observation=context)
        zoom = parse_turn(answer.text, duration_s=float("inf"), max_frames=2**31).zoom
        turns.append(Turn(ExternalAction(answer.text, ids), answer.text, zoom, None))
        if reply is not None:
            context = reply
    assert prompt is not None  # the last turn is learned from
    found = extract_answer(said[-1].text)
    status = EpisodeStatus.NO_ANSWER if found is None else EpisodeStatus.ANSWERED
    return Trajectory(EpisodeId(0, name, 0), wire.name, prompt, tuple(turns), status, found, worker="file")


def _joined(*parts: TokenContext | None) -> TokenContext:
    """Contexts one after another."""
    there = [part for part in parts if part is not None]
    return TokenContext(
        compact_ids=tuple(id for part in there for id in part.compact_ids),
        grids=tuple(grid for part in there for grid in part.grids),
        frame_refs=tuple(ref for part in there for ref in part.frame_refs),
        pad_id=there[0].pad_id,
    )


def fold_turns_into_prompt(trajectory: Trajectory, num_context_turns: int) -> Trajectory:
    """`trajectory` with its first `num_context_turns` turns made part of the prompt: read, and not learned from."""
    first = trajectory.turns[:num_context_turns]
    said = [
        part
        for turn in first
        for part in (TokenContext(turn.action.token_ids, pad_id=trajectory.prompt.pad_id), turn.observation)
    ]
    prompt = _joined(trajectory.prompt, *said)
    return replace(trajectory, prompt=prompt, turns=trajectory.turns[num_context_turns:])


def _conversation(sample: Any) -> tuple[str | None, list[_SftMessage]]:
    """The system message of a record, and those of user and assistant in turns.

    Raises:
        ValueError: It is not of the layout; says what is wrong.
    """
    if not isinstance(sample, Mapping):
        raise ValueError(f"expected an object, found {type(sample).__name__}")
    said = _messages(sample)
    images = sample.get("images") or []
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError("'images' must be a list of paths")
    marks = sum(message.images for message in said)
    if marks != len(images):
        raise ValueError(f"{marks} {IMAGE_MARKER} in messages for {len(images)} images")
    system = said.pop(0).text if said[0].role == "system" else None
    if [message.role for message in said] != ["user", "assistant"] * (len(said) // 2) or not said:
        raise ValueError("after an optional system message, user and assistant must take turns")
    if not said[-1].learned:
        raise ValueError("the last message must be an assistant's, and one to learn from")
    return system, said


def _messages(sample: Mapping[str, Any]) -> list[_SftMessage]:
    """The messages of a record, marks put as the wire format has them."""
    messages = sample.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' must be a list of messages")
    said: list[_SftMessage] = []
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        text = message.get("content") if isinstance(message, dict) else None
        if role not in _ROLES or not isinstance(text, str):
            raise ValueError(f"message {number} needs a role of {', '.join(_ROLES)} and a text as content")
        if found := next((token for token in _CONTROL if token in text), None):
            raise ValueError(f"message {number} holds the control token {found}")
        count = text.count(IMAGE_MARKER)
        said.append(
            _SftMessage(role, text.replace(IMAGE_MARKER, IMAGE_SLOT), count, message.get("weight") != 0)
        )
    if any(m.images for m in said if m.role != "user"):
        raise ValueError(f"only messages of the user may hold {IMAGE_MARKER}")
    return said


@dataclass(frozen=True, slots=True)
class SftFile:
    """The samples of a file, checked, their images not read yet."""

    path: Path
    records: tuple[Mapping[str, Any], ...]

    @classmethod
    def load(cls, path: Path | str) -> SftFile:
        """Reads and checks a file.

        Raises:
            UserError: It is missing or not of the layout, or an image is missing; names the record.
        """
        path = Path(path)
        records = _records(path)
        for number, record in enumerate(records):
            try:
                _conversation(record)
                for image in record.get("images") or ():
                    if not (path.parent / image).is_file():
                        raise ValueError(f"there is no image {path.parent / image}")
            except ValueError as error:
                raise UserError(f"{path}, record {number}: {error}") from error
        return cls(path, tuple(records))

    async def load_trajectories(
        self,
        wire: ChatFormat,
        size: FrameSize,
        frames: FrameSource,
        advance: Callable[[int], None] = lambda _: None,
    ) -> list[Trajectory]:
        """Every sample to learn from, its images read and resized for the model.

        Args:
            wire: Of the policy that is to learn.
            size: What its frames may be.
            frames: Who reads the images.
            advance: Called with the number of samples done since the last call.

        Raises:
            UserError: An image cannot be read; names the record.
        """
        found = []
        for number, record in enumerate(self.records):
            paths = [str(self.path.parent / image) for image in record.get("images") or ()]
            try:
                read = await asyncio.gather(
                    *(frames.overview(image, OverviewRequest(1, 1), size) for image in paths)
                )
                shown = [clip.frames[0] for clip in read]
                found.append(sample_to_trajectory(record, shown, wire, f"{self.path.stem}-{number}"))
            except (ValueError, VideoError) as error:
                raise UserError(f"{self.path}, record {number}: {error}") from error
            advance(1)
        return found


def _records(path: Path) -> list[Any]:
    """The records of a JSON list, or of lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = text.lstrip().startswith("{")
        records = (
            [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the SFT file {path}: {error}") from error
    if not isinstance(records, list) or not records:
        raise UserError(f"{path} holds no samples: expected a JSON list of records with messages and images")
    return records
