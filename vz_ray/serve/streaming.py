"""Stream of events of one request: parse the generated text, translate events of the environment."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from vz_ray.env import events
from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.protocols import Prompt
from vz_ray.env.trajectory import EpisodeStatus, RejectedZoom, Trajectory, Turn
from vz_ray.env.zoom_call import REASONING_OPEN
from vz_ray.serve.agent_protocol import (
    AgentEvent,
    AgentRequest,
    FrameThumbnail,
    OverviewEvent,
    RequestCompleted,
    RequestFailed,
    TextDelta,
    ZoomFinished,
    ZoomStarted,
)
from vz_ray.serve.client_zoom import ClientZoomRequired
from vz_ray.video.frame import Clip, Frame, ZoomRequest
from vz_ray.video.image_encoding import encode_data_uri

_TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<video_zoom>", "</video_zoom>", "<|im_end|>")
_REASONING_TAGS = ("</think>", "<|im_end|>")
"""Tags inside `<think>`; calls and answers are only quoted there."""


@dataclass(slots=True)
class TagStreamParser:
    """Incremental parser of one turn: separates the answer from the reasoning.

    Text inside `<answer>` is the answer. A zoom call is neither. Everything else is reasoning, and so is
    everything inside `<think>`. The parser holds back text that may be the beginning of a tag until it is
    unambiguous.

    Example:
        parser = TagStreamParser()
        parser.feed("<think>red</think><ans") == [("red", False)]
        parser.feed("<think>red</think><answer>A") == [("A", True)]
    """

    position: int = 0
    """Number of characters that are parsed."""
    open_tag: str = ""
    """The open tag; initially `<think>` if the prompt opened the reasoning."""
    passages: list[tuple[str, str]] = field(default_factory=list)
    """Pieces of text outside `<answer>` in order, each after its open tag: `<think>` or empty."""
    answers: list[str] = field(default_factory=list)

    def feed(self, text_so_far: str, *, final: bool = False) -> list[tuple[str, bool]]:
        """Return the new pieces of text, each with True if it belongs to the answer.

        Args:
            text_so_far: The whole turn up to now.
            final: The turn is complete.
        """
        pieces: list[tuple[str, bool]] = []
        while self.position < len(text_so_far):
            tags = _REASONING_TAGS if self.open_tag == REASONING_OPEN else _TAGS
            tag = _pattern(tags).search(text_so_far, self.position)
            held_back = 0 if final else _partial_tag_length(text_so_far[self.position :], tags)
            end = tag.start() if tag else len(text_so_far) - held_back
            self._add_text(text_so_far[self.position : end], pieces)
            if tag is None:
                self.position = end
                break
            self.position = tag.end()
            self._enter_tag(tag.group())
        return pieces

    @property
    def answer(self) -> str:
        """The last answer span, as the environment parses it."""
        return self.answers[-1].strip() if self.answers else ""

    @property
    def reasoning(self) -> str:
        """The text outside `<answer>`, without zoom calls."""
        return "".join(text for _, text in self.passages).strip()

    @property
    def thought(self) -> str:
        """The part of `reasoning` inside `<think>`, whether closed or not."""
        return "".join(text for tag, text in self.passages if tag == REASONING_OPEN).strip()

    @property
    def untagged(self) -> str:
        """The part of `reasoning` outside `<think>`."""
        return "".join(text for tag, text in self.passages if tag != REASONING_OPEN).strip()

    def _enter_tag(self, tag: str) -> None:
        self.open_tag = "" if tag.startswith("</") else tag
        if tag == "<answer>":
            self.answers.append("")

    def _add_text(self, text: str, pieces: list[tuple[str, bool]]) -> None:
        if not text or self.open_tag == "<video_zoom>":
            return
        is_answer = self.open_tag == "<answer>"
        if is_answer:
            self.answers[-1] += text
        else:
            self.passages.append((self.open_tag, text))
        pieces.append((text, is_answer))


@cache
def _pattern(tags: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tags)))


def _partial_tag_length(text: str, tags: Sequence[str]) -> int:
    """Return the length of the longest suffix of `text` that may be the beginning of a tag."""
    for length in range(min(len(text), max(map(len, tags)) - 1), 0, -1):
        if any(tag.startswith(text[-length:]) for tag in tags):
            return length
    return 0


@dataclass
class EventTranslator:
    """Translate environment events and generated text of one episode into events for the client.

    Args:
        request: The request of the episode.
        emit: Callback for each event; None only collects them in `events`.
        opens_reasoning: The prompt of each turn ends inside `<think>`; see `ChatFormat.opens_reasoning`.
    """

    request: AgentRequest
    emit: Callable[[AgentEvent], None] | None
    opens_reasoning: bool = False

    def __post_init__(self) -> None:
        self.events: list[AgentEvent] = []
        self._turn, self._parser, self._text_so_far = 0, self._new_parser(), ""

    def on_env_event(self, event: events.EpisodeEvent) -> None:
        """Translate an event of the environment."""
        match event:
            case events.EpisodeStarted(videos, overviews):
                for index, (video, clip) in enumerate(zip(videos, overviews, strict=True)):
                    self._add(OverviewEvent(index, video.duration_s, self._thumbnails(clip)))
            case events.ZoomRequested(turn_index, zoom):
                self._flush(final=True)
                self._add(ZoomStarted(turn_index, zoom.video, (zoom.start_s, zoom.end_s), zoom.fps))
            case events.TurnCompleted(turn_index, turn, clip):
                self._flush(final=True)
                self._turn, self._parser = turn_index + 1, self._new_parser()
                if turn.zoom is not None:
                    self._add(self._zoom_finished(turn_index, turn, clip))

    def on_text(self, text_so_far: str) -> None:
        """Translate the text of the current turn up to now."""
        self._text_so_far = text_so_far
        self._flush()

    def _new_parser(self) -> TagStreamParser:
        return TagStreamParser(open_tag=REASONING_OPEN if self.opens_reasoning else "")

    def _flush(self, *, final: bool = False) -> None:
        for text, is_answer in self._parser.feed(self._text_so_far, final=final):
            self._add(TextDelta(self._turn, text, is_answer))
        if final:
            self._text_so_far = ""

    def _zoom_finished(self, turn_index: int, turn: Turn, clip: Clip | None) -> ZoomFinished:
        rejected = turn.zoom if isinstance(turn.zoom, RejectedZoom) else None
        zoom = turn.zoom if isinstance(turn.zoom, ZoomRequest) else rejected.requested if rejected else None
        return ZoomFinished(
            turn=turn_index,
            video=zoom.video if zoom else 0,
            segment=(zoom.start_s, zoom.end_s) if zoom else None,
            fps=zoom.fps if zoom else None,
            frames=self._thumbnails(clip) if clip else (),
            refused=rejected.message if rejected else "",
            reasoning=parse_completed_turn(turn.text).reasoning,
            seconds=turn.seconds,
        )

    def _thumbnails(self, clip: Clip) -> tuple[FrameThumbnail, ...]:
        return tuple(FrameThumbnail(frame.pts_s, self._encode(frame)) for frame in clip.frames)

    def _encode(self, frame: Frame) -> str:
        return encode_data_uri(frame.rgb, self.request.thumbnail_size) if self.request.thumbnail_size else ""

    def _add(self, event: AgentEvent) -> None:
        self.events.append(event)
        if self.emit is not None:
            self.emit(event)


def coalesce(batch: list[AgentEvent], event: AgentEvent) -> list[AgentEvent]:
    """Return `batch` with `event` appended; a text delta is joined to a preceding one of the same kind."""
    last = batch[-1]
    if isinstance(last, TextDelta) and isinstance(event, TextDelta) and last.is_answer == event.is_answer:
        return [*batch[:-1], replace(last, text=last.text + event.text)]
    return [*batch, event]


def parse_completed_turn(text: str) -> TagStreamParser:
    """Parse the whole text of a turn."""
    parser = TagStreamParser()
    parser.feed(text, final=True)
    return parser


def client_zoom_result(
    client_zoom: ClientZoomRequired,
    last_prompt: Prompt,
    turn_token_ids: Sequence[Sequence[int]],
    chat_format: ChatFormat,
    *,
    version: int,
    seconds: float,
) -> RequestCompleted:
    """Build the last event of a request whose next zoom the client executes.

    Args:
        client_zoom: The zoom.
        last_prompt: Prompt of the agent's last turn.
        turn_token_ids: Sampled tokens of each turn.
        chat_format: Chat format of the episode.
        version: Weight version that answered.
        seconds: Wall time of the episode.
    """
    grid = chat_format.grid
    patch_grids = (grid.patch_grid(*frame.rgb.shape[:2]) for frame in last_prompt.frames)
    visual_tokens = sum(grid.num_visual_tokens(patch_grid) - 1 for patch_grid in patch_grids)
    return RequestCompleted(
        text="",
        reasoning=parse_completed_turn(chat_format.decode_turn(turn_token_ids[-1])).reasoning,
        status="zoom",
        version=version,
        prompt_tokens=len(last_prompt.compact_ids) + visual_tokens,
        completion_tokens=sum(map(len, turn_token_ids)),
        frames=len(last_prompt.frames),
        zooms=0,
        seconds=seconds,
        tool_call_arguments=client_zoom.arguments,
    )


def episode_result(trajectory: Trajectory, version: int) -> RequestCompleted | RequestFailed:
    """Build the last event of a request from its trajectory."""
    if trajectory.status is EpisodeStatus.FAILED:
        # The full error may contain paths of the server.
        return RequestFailed(f"{trajectory.extra['model_message']}", "invalid_media")
    if not trajectory.turns:
        return RequestFailed(
            "the question and the video's overview are longer than the context", "context_length_exceeded"
        )
    last, answer = parse_completed_turn(trajectory.turns[-1].text), trajectory.answer
    gate = trajectory.extra.get("gate")
    completion_tokens = sum(len(turn.action.token_ids) for turn in trajectory.turns)
    return RequestCompleted(
        text=last.untagged if answer is None else answer,
        reasoning=last.thought if answer is None else last.reasoning,
        status=trajectory.status.value,
        version=max(trajectory.weight_versions, default=version),
        prompt_tokens=trajectory.num_tokens - completion_tokens,
        completion_tokens=completion_tokens,
        frames=len(trajectory.frame_refs),
        zooms=len(trajectory.zooms),
        seconds=trajectory.seconds,
        gated=isinstance(gate, dict) and gate.get("zoom") is False,
    )
