"""What a client is told of an episode: while it is played, and at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vz_ray.env import events
from vz_ray.env.chat_format import ChatFormat, patch_grid
from vz_ray.env.protocols import Prompt
from vz_ray.env.trajectory import EpisodeStatus, RejectedZoom, Trajectory, Turn, num_visual_tokens
from vz_ray.serve import agent_protocol
from vz_ray.serve.agent_protocol import AgentEvent, AgentRequest, RequestCompleted, RequestFailed, TextDelta
from vz_ray.serve.client_zoom import ClientZoomRequired
from vz_ray.serve.tag_parser import TagStreamParser
from vz_ray.video.frame import Clip, Frame, ZoomRequest
from vz_ray.video.image_encoding import encode_data_uri


@dataclass
class EventTranslator:
    """Turns what happens in an episode into what its client is told."""

    request: AgentRequest
    emit: Callable[[AgentEvent], None] | None

    def __post_init__(self) -> None:
        self.events: list[AgentEvent] = []
        self._turn, self._speech, self._so_far = 0, TagStreamParser(), ""

    def on_env_event(self, event: events.EpisodeEvent) -> None:
        match event:
            case events.EpisodeStarted(videos, overviews):
                for number, (video, clip) in enumerate(zip(videos, overviews, strict=True)):
                    self._add(agent_protocol.OverviewEvent(number, video.duration_s, self._shown(clip)))
            case events.ZoomRequested(turn, zoom):
                self._flush(over=True)
                self._add(agent_protocol.ZoomStarted(turn, zoom.video, (zoom.start_s, zoom.end_s), zoom.fps))
            case events.TurnCompleted(number, turn, clip):
                self._flush(over=True)
                self._turn, self._speech = number + 1, TagStreamParser()
                if turn.zoom is not None:
                    self._add(self._zoomed(number, turn, clip))

    def on_text(self, so_far: str) -> None:
        self._so_far = so_far
        self._flush()

    def _flush(self, *, over: bool = False) -> None:
        for text, answer in self._speech.feed(self._so_far, final=over):
            self._add(agent_protocol.TextDelta(self._turn, text, answer))
        if over:
            self._so_far = ""

    def _zoomed(self, number: int, turn: Turn, clip: Clip | None) -> agent_protocol.ZoomFinished:
        refused = turn.zoom if isinstance(turn.zoom, RejectedZoom) else None
        zoom = turn.zoom if isinstance(turn.zoom, ZoomRequest) else refused.requested if refused else None
        return agent_protocol.ZoomFinished(
            turn=number,
            video=zoom.video if zoom else 0,
            segment=(zoom.start_s, zoom.end_s) if zoom else None,
            fps=zoom.fps if zoom else None,
            frames=self._shown(clip) if clip else (),
            refused=refused.message if refused else "",
            reasoning=extract_reasoning(turn.text),
            seconds=turn.seconds,
        )

    def _shown(self, clip: Clip) -> tuple[agent_protocol.FrameThumbnail, ...]:
        return tuple(agent_protocol.FrameThumbnail(frame.pts_s, self._image(frame)) for frame in clip.frames)

    def _image(self, frame: Frame) -> str:
        return encode_data_uri(frame.rgb, self.request.thumbnail_size) if self.request.thumbnail_size else ""

    def _add(self, event: AgentEvent) -> None:
        self.events.append(event)
        if self.emit is not None:
            self.emit(event)


def coalesce(batch: list[AgentEvent], event: AgentEvent) -> list[AgentEvent]:
    """`batch` and one more; text that goes on is put together."""
    last = batch[-1]
    if isinstance(last, TextDelta) and isinstance(event, TextDelta) and last.is_answer == event.is_answer:
        return [*batch[:-1], replace(last, text=last.text + event.text)]
    return [*batch, event]


def extract_reasoning(text: str) -> str:
    """What a turn says beside its zoom and its answer."""
    speech = TagStreamParser()
    speech.feed(text, final=True)
    return speech.reasoning.strip()


def client_zoom_result(
    asked: ClientZoomRequired,
    read: Prompt,
    said: Sequence[Sequence[int]],
    wire: ChatFormat,
    *,
    version: int,
    seconds: float,
) -> RequestCompleted:
    """The end of a request whose next zoom is the client's.

    Args:
        asked: That zoom.
        read: What the agent read before its last turn.
        said: Tokens of each of its turns.
    """
    return RequestCompleted(
        text="",
        reasoning=extract_reasoning(wire.decode_turn(said[-1])),
        status="zoom",
        version=version,
        prompt_tokens=len(read.compact_ids) + sum(num_visual_tokens(patch_grid(f)) - 1 for f in read.frames),
        completion_tokens=sum(map(len, said)),
        frames=len(read.frames),
        zooms=0,
        seconds=seconds,
        tool_call_arguments=asked.arguments,
    )


def episode_result(trajectory: Trajectory, version: int) -> RequestCompleted | RequestFailed:
    """What the client is told of a played episode."""
    if trajectory.status is EpisodeStatus.FAILED:
        # The whole error names paths of the server's.
        return RequestFailed(f"{trajectory.extra['in_short']}", "invalid_media")
    if not trajectory.turns:
        return RequestFailed(
            "the question and the video's overview are longer than the context", "context_length_exceeded"
        )
    last = trajectory.turns[-1]
    gate = trajectory.extra.get("gate")
    return RequestCompleted(
        text=trajectory.answer if trajectory.answer is not None else extract_reasoning(last.text),
        reasoning=extract_reasoning(last.text) if trajectory.answer is not None else "",
        status=trajectory.status.value,
        version=max(trajectory.weight_versions, default=version),
        prompt_tokens=trajectory.num_tokens - sum(len(turn.action.token_ids) for turn in trajectory.turns),
        completion_tokens=sum(len(turn.action.token_ids) for turn in trajectory.turns),
        frames=len(trajectory.frame_refs),
        zooms=len(trajectory.zooms),
        seconds=trajectory.seconds,
        gated=isinstance(gate, dict) and gate.get("zoom") is False,
    )
