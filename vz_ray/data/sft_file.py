"""Conversion between trajectories and the SFT file format of common training tools.

    [{"messages": [{"role": "system", "content": ...},
                   {"role": "user", "content": "<frame0_time0.00s><image>... What is shown?"},
                   {"role": "assistant", "content": "<think>...</think><video_zoom>...</video_zoom>"}, ...],
      "images": ["images/0a/0a1b.png", ...]}]

A message contains one `<image>` per frame, in the order of `images`, whose paths are relative to the
file. JSON lines are accepted as well. Assistant messages with `"weight": 0` are context without loss,
as in OpenAI's fine-tuning files.
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
from vz_ray.video.errors import VideoError
from vz_ray.video.frame import Frame, FrameRef, FrameSize, OverviewRequest

IMAGE_MARKER = "<image>"
_MESSAGE = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
_ROLES = ("system", "user", "assistant")
_CONTROL_TOKENS = (*VISION_PLACEHOLDERS, "<|im_start|>", "<|im_end|>")


class SampleEncodingError(ValueError):
    """A trajectory cannot be converted: its text contains `<image>`, or its markers and frames do not match."""


def trajectory_to_sample(
    trajectory: Trajectory,
    chat_format: ChatFormat,
    path_of: Callable[[FrameRef], str],
    *,
    num_context_turns: int = 0,
) -> dict[str, Any]:
    """Convert a trajectory to a sample of the SFT format.

    Args:
        trajectory: Trajectory in `chat_format`.
        chat_format: Chat format with the tokenizer.
        path_of: Returns the image path of a frame.
        num_context_turns: Number of first turns to exclude from the loss.

    Raises:
        SampleEncodingError: A text contains `<image>`, or markers and frames do not match.
    """
    messages: list[dict[str, Any]] = []
    num_turns = 0
    for role, text in _MESSAGE.findall(_decode(trajectory, chat_format)):
        if IMAGE_MARKER in text:
            raise SampleEncodingError(
                f"trajectory {trajectory.id}: a message contains the text {IMAGE_MARKER}, which marks a frame"
            )
        if role == "assistant" and not chat_format.opens_reasoning:
            text = text.removeprefix(chat_format.turn_prefix)  # part of the prompt
        message: dict[str, Any] = {"role": role, "content": text.replace(IMAGE_SLOT, IMAGE_MARKER)}
        if role == "assistant":
            num_turns += 1
            message |= {"weight": 0} if num_turns <= num_context_turns else {}
        messages.append(message)
    images = [path_of(ref) for ref in trajectory.frame_refs]
    num_markers = sum(message["content"].count(IMAGE_MARKER) for message in messages)
    if num_markers != len(images) or num_turns != len(trajectory.turns):
        raise SampleEncodingError(
            f"trajectory {trajectory.id}: {num_markers} image markers for {len(images)} frames, and "
            f"{num_turns} assistant messages for {len(trajectory.turns)} turns"
        )
    return {"messages": messages, "images": images}


def _decode(trajectory: Trajectory, chat_format: ChatFormat) -> str:
    """Decode the conversation to text, with one image slot per frame."""
    ids = list(trajectory.prompt.compact_ids)
    for turn in trajectory.turns:
        ids += [*turn.action.token_ids, *(turn.observation.compact_ids if turn.observation else ())]
    return chat_format.tokenizer.decode(ids, skip_special_tokens=False)


@dataclass(frozen=True, slots=True)
class _SftMessage:
    """Message of a sample. `in_loss` is False for assistant messages of weight 0."""

    role: str
    text: str
    num_images: int
    in_loss: bool


def sample_to_trajectory(
    sample: Mapping[str, Any], frames: Sequence[Frame], chat_format: ChatFormat, name: str
) -> Trajectory:
    """Convert a sample of the SFT format to a trajectory.

    Turns of weight 0 become context: part of the prompt, or of the observation before the next turn.

    Args:
        sample: Record of an SFT file.
        frames: Images of the sample, in order.
        chat_format: Chat format of the policy to train.
        name: Id of the trajectory, unique in the file.

    Raises:
        ValueError: The sample is invalid. The message names the cause.
    """
    system, messages = _parse_sample(sample)
    remaining_frames = iter(frames)

    def take_frames(message: _SftMessage) -> list[Frame]:
        return list(islice(remaining_frames, message.num_images))

    first_messages = (
        [("user", messages[0].text)] if system is None else [("system", system), ("user", messages[0].text)]
    )
    context = chat_format.encode_messages(first_messages, take_frames(messages[0]))
    prompt: TokenContext | None = None
    turns: list[Turn] = []
    for answer, reply in zip(messages[1::2], [*messages[2::2], None], strict=True):
        ids = chat_format.encode_assistant(answer.text)
        observation = None
        if reply is not None:
            observation = chat_format.encode_observation(
                reply.text, take_frames(reply), end_sampled=ids[-1] == chat_format.end_id
            )
        if not answer.in_loss:
            context = _concatenate(context, TokenContext(ids, pad_id=chat_format.pad_id), observation)
            continue
        if prompt is None:
            prompt = context
        else:
            turns[-1] = replace(turns[-1], observation=context)
        zoom = parse_turn(answer.text, duration_s=float("inf"), max_frames=2**31).zoom
        turns.append(Turn(ExternalAction(answer.text, ids), answer.text, zoom, None))
        if observation is not None:
            context = observation
    assert prompt is not None  # the last turn is in the loss
    final_answer = extract_answer(messages[-1].text)
    status = EpisodeStatus.NO_ANSWER if final_answer is None else EpisodeStatus.ANSWERED
    return Trajectory(
        EpisodeId(0, name, 0), chat_format.name, prompt, tuple(turns), status, final_answer, worker="file"
    )


def _concatenate(*contexts: TokenContext | None) -> TokenContext:
    """Concatenate the contexts that are not None."""
    present = [context for context in contexts if context is not None]
    return TokenContext(
        compact_ids=tuple(token for context in present for token in context.compact_ids),
        grids=tuple(grid for context in present for grid in context.grids),
        frame_refs=tuple(ref for context in present for ref in context.frame_refs),
        pad_id=present[0].pad_id,
        merge_size=max(context.merge_size for context in present),
    )


def fold_turns_into_prompt(trajectory: Trajectory, num_context_turns: int) -> Trajectory:
    """Move the first `num_context_turns` turns into the prompt, which is excluded from the loss."""
    prompt = trajectory.prompt
    for turn in trajectory.turns[:num_context_turns]:
        action = TokenContext(turn.action.token_ids, pad_id=prompt.pad_id)
        prompt = _concatenate(prompt, action, turn.observation)
    return replace(trajectory, prompt=prompt, turns=trajectory.turns[num_context_turns:])


def _parse_sample(sample: Any) -> tuple[str | None, list[_SftMessage]]:
    """Return the system message of a sample, and the alternating user and assistant messages.

    Raises:
        ValueError: The sample is invalid. The message names the cause.
    """
    if not isinstance(sample, Mapping):
        raise ValueError(f"expected an object, got {type(sample).__name__}")
    messages = _parse_messages(sample)
    images = sample.get("images") or []
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError("'images' must be a list of paths")
    num_markers = sum(message.num_images for message in messages)
    if num_markers != len(images):
        raise ValueError(f"{num_markers} {IMAGE_MARKER} in messages for {len(images)} images")
    system = messages.pop(0).text if messages[0].role == "system" else None
    roles = [message.role for message in messages]
    if roles != ["user", "assistant"] * (len(messages) // 2) or not messages:
        raise ValueError("user and assistant messages must alternate after an optional system message")
    if not messages[-1].in_loss:
        raise ValueError("the last message must be an assistant message without weight 0")
    return system, messages


def _parse_messages(sample: Mapping[str, Any]) -> list[_SftMessage]:
    """Return the messages of a sample, with image slots in place of markers."""
    raw_messages = sample.get("messages")
    if not isinstance(raw_messages, list) or not raw_messages:
        raise ValueError("'messages' must be a list of messages")
    messages: list[_SftMessage] = []
    for number, message in enumerate(raw_messages):
        role = message.get("role") if isinstance(message, dict) else None
        text = message.get("content") if isinstance(message, dict) else None
        if role not in _ROLES or not isinstance(text, str):
            raise ValueError(f"message {number} needs a role ({', '.join(_ROLES)}) and a text as content")
        if control_token := next((token for token in _CONTROL_TOKENS if token in text), None):
            raise ValueError(f"message {number} contains the control token {control_token}")
        num_images = text.count(IMAGE_MARKER)
        text = text.replace(IMAGE_MARKER, IMAGE_SLOT)
        messages.append(_SftMessage(role, text, num_images, message.get("weight") != 0))
    if any(message.num_images for message in messages if message.role != "user"):
        raise ValueError(f"only user messages may contain {IMAGE_MARKER}")
    return messages


@dataclass(frozen=True, slots=True)
class SftFile:
    """Validated samples of a file; images are read later."""

    path: Path
    records: tuple[Mapping[str, Any], ...]

    @classmethod
    def load(cls, path: Path | str) -> SftFile:
        """Read and validate a file.

        Raises:
            UserError: The file, a record or an image is missing or invalid. The message names the record.
        """
        path = Path(path)
        records = _read_records(path)
        for number, record in enumerate(records):
            try:
                _parse_sample(record)
                for image in record.get("images") or ():
                    if not (path.parent / image).is_file():
                        raise ValueError(f"no image {path.parent / image}")
            except ValueError as error:
                raise UserError(f"{path}, record {number}: {error}") from error
        return cls(path, tuple(records))

    async def load_trajectories(
        self,
        chat_format: ChatFormat,
        size: FrameSize,
        frames: FrameSource,
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> list[Trajectory]:
        """Convert all samples to trajectories, with images resized for the model.

        Args:
            chat_format: Chat format of the policy to train.
            size: Bounds on the area of the images.
            frames: Source of the images.
            on_progress: Called with the number of samples converted since the last call.

        Raises:
            UserError: An image cannot be read. The message names the record.
        """
        trajectories = []
        for number, record in enumerate(self.records):
            paths = [str(self.path.parent / image) for image in record.get("images") or ()]
            try:
                clips = await asyncio.gather(*(frames.clip(image, OverviewRequest(1, 1), size) for image in paths))
                images = [clip.frames[0] for clip in clips]
                name = f"{self.path.stem}-{number}"
                trajectories.append(sample_to_trajectory(record, images, chat_format, name))
            except (ValueError, VideoError) as error:
                raise UserError(f"{self.path}, record {number}: {error}") from error
            on_progress(1)
        return trajectories


def _read_records(path: Path) -> list[Any]:
    """Read the records of a JSON list or of JSON lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        is_json_lines = text.lstrip().startswith("{")
        records = (
            [json.loads(line) for line in text.splitlines() if line.strip()] if is_json_lines else json.loads(text)
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the SFT file {path}: {error}") from error
    if not isinstance(records, list) or not records:
        raise UserError(f"{path} contains no samples; it must be a JSON list of records with messages and images")
    return records
