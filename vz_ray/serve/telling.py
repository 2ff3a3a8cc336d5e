"""What a client is told of an episode: while it is played, and at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vz_ray.episode import events
from vz_ray.episode.protocols import Prompt
from vz_ray.episode.trajectory import Status, Trajectory, Turn, ZoomRefused, visual_tokens
from vz_ray.episode.wire import WireFormat, grid_of
from vz_ray.serve import asking
from vz_ray.serve.asking import Answered, Event, Failed, Question, Said
from vz_ray.serve.client_tools import ZoomForClient
from vz_ray.serve.speech import Speech
from vz_ray.video.frame import Clip, Frame, Zoom
from vz_ray.video.image import data_uri


@dataclass
class Telling:
    """Turns what happens in an episode into what its client is told."""

    question: Question
    tell: Callable[[Event], None] | None

    def __post_init__(self) -> None:
        self.events: list[Event] = []
        self._turn, self._speech, self._so_far = 0, Speech(), ""

    def happened(self, event: events.Event) -> None:
        match event:
            case events.Begun(videos, overviews):
                for number, (video, clip) in enumerate(zip(videos, overviews, strict=True)):
                    self._add(asking.Overview(number, video.duration_s, self._shown(clip)))
            case events.Asked(turn, zoom):
                self._flush(over=True)
                self._add(asking.Zooming(turn, zoom.video, (zoom.start_s, zoom.end_s), zoom.fps))
            case events.Ended(number, turn, clip):
                self._flush(over=True)
                self._turn, self._speech = number + 1, Speech()
                if turn.zoom is not None:
                    self._add(self._zoomed(number, turn, clip))

    def spoken(self, so_far: str) -> None:
        self._so_far = so_far
        self._flush()

    def _flush(self, *, over: bool = False) -> None:
        for text, answer in self._speech.hear(self._so_far, over=over):
            self._add(asking.Said(self._turn, text, answer))
        if over:
            self._so_far = ""

    def _zoomed(self, number: int, turn: Turn, clip: Clip | None) -> asking.Zoomed:
        refused = turn.zoom if isinstance(turn.zoom, ZoomRefused) else None
        zoom = turn.zoom if isinstance(turn.zoom, Zoom) else refused.asked if refused else None
        return asking.Zoomed(
            turn=number,
            video=zoom.video if zoom else 0,
            segment=(zoom.start_s, zoom.end_s) if zoom else None,
            fps=zoom.fps if zoom else None,
            frames=self._shown(clip) if clip else (),
            refused=refused.message if refused else "",
            reasoning=reasoning_of(turn.text),
            seconds=turn.seconds,
        )

    def _shown(self, clip: Clip) -> tuple[asking.Shown, ...]:
        return tuple(asking.Shown(frame.pts_s, self._image(frame)) for frame in clip.frames)

    def _image(self, frame: Frame) -> str:
        return data_uri(frame.rgb, self.question.thumbnails) if self.question.thumbnails else ""

    def _add(self, event: Event) -> None:
        self.events.append(event)
        if self.tell is not None:
            self.tell(event)


def joined(batch: list[Event], event: Event) -> list[Event]:
    """`batch` and one more; text that goes on is put together."""
    last = batch[-1]
    if isinstance(last, Said) and isinstance(event, Said) and last.answer == event.answer:
        return [*batch[:-1], replace(last, text=last.text + event.text)]
    return [*batch, event]


def reasoning_of(text: str) -> str:
    """What a turn says beside its zoom and its answer."""
    speech = Speech()
    speech.hear(text, over=True)
    return speech.reasoning.strip()


def calling(
    asked: ZoomForClient,
    read: Prompt,
    said: Sequence[Sequence[int]],
    wire: WireFormat,
    *,
    version: int,
    seconds: float,
) -> Answered:
    """The end of a request whose next zoom is the client's.

    Args:
        asked: That zoom.
        read: What the agent read before its last turn.
        said: Tokens of each of its turns.
    """
    return Answered(
        text="",
        reasoning=reasoning_of(wire.text_of(said[-1])),
        status="zoom",
        version=version,
        prompt_tokens=len(read.compact_ids) + sum(visual_tokens(grid_of(f)) - 1 for f in read.frames),
        sampled_tokens=sum(map(len, said)),
        frames=len(read.frames),
        zooms=0,
        seconds=seconds,
        call=asked.arguments,
    )


def ending(trajectory: Trajectory, version: int) -> Answered | Failed:
    """What the client is told of a played episode."""
    if trajectory.status is Status.FAILED:
        # The whole error names paths of the server's.
        return Failed(f"{trajectory.extra['in_short']}", "invalid_media")
    if not trajectory.turns:
        return Failed(
            "the question and the video's overview are longer than the context", "context_length_exceeded"
        )
    last = trajectory.turns[-1]
    gate = trajectory.extra.get("gate")
    return Answered(
        text=trajectory.answer if trajectory.answer is not None else reasoning_of(last.text),
        reasoning=reasoning_of(last.text) if trajectory.answer is not None else "",
        status=trajectory.status.value,
        version=max(trajectory.weight_versions, default=version),
        prompt_tokens=trajectory.length - sum(len(turn.action.token_ids) for turn in trajectory.turns),
        sampled_tokens=sum(len(turn.action.token_ids) for turn in trajectory.turns),
        frames=len(trajectory.refs),
        zooms=len(trajectory.zooms),
        seconds=trajectory.seconds,
        gated=isinstance(gate, dict) and gate.get("zoom") is False,
    )
