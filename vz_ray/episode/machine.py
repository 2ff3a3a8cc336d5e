"""The episode as a pure state machine: actions in, requests out, a trajectory at the end.

    begin(overview) -> ACT -> act(turn) -> OVER
                        ^        |
                        |        v zoom accepted
                        +---- LOOK <- clip(...) or no_clip(...)

A refused zoom goes from ACT to ACT with an error turn. Appending is atomic:
tokens, grids and frame refs of a reply are added together after the budget
check, or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.task import Task
from vz_ray.episode.protocols import Message, Prompt
from vz_ray.episode.trajectory import (
    Context,
    EpisodeId,
    Sampled,
    Sampling,
    Status,
    Trajectory,
    Turn,
    Written,
    ZoomFault,
    ZoomRefused,
)
from vz_ray.episode.wire import WireFormat
from vz_ray.episode.zoom_call import read_turn
from vz_ray.video.frame import Clip, Frame, Overview, VideoInfo, Zoom
from vz_ray.video.subtitles import Subtitle

MIN_TURN_TOKENS = 16
"""A turn with less room than this is not begun: it could not hold an answer."""


class State(StrEnum):
    NEW = "new"
    ACT = "act"
    LOOK = "look"
    OVER = "over"


@dataclass
class Episode:
    """One question being played."""

    id: EpisodeId
    task: Task
    video: VideoInfo
    wire: WireFormat
    config: EpisodeConfig
    subtitles: tuple[Subtitle, ...] = ()
    more: tuple[VideoInfo, ...] = ()
    """Further videos that the question is about."""
    state: State = State.NEW
    turns: list[Turn] = field(default_factory=list)
    status: Status = Status.NO_ANSWER
    answer: str | None = None

    # -- what it needs next ---------------------------------------------------

    @property
    def overview(self) -> Overview:
        """Of each video: several share what may be shown."""
        c = self.config
        # Pictures of the question are images too.
        frames = min(c.overview_frames, c.max_images - len(self.task.pictures))
        return Overview(c.overview_fps, max(1, frames // (1 + len(self.more))), c.overview_spread)

    @property
    def prompt(self) -> Prompt:
        """The conversation so far, ready to be continued by the policy."""
        return Prompt(tuple(self._compact), tuple(self._frames), tuple(self._messages))

    def sampling(self, base: Sampling) -> Sampling:
        """`base` cut to what the context still holds, with a seed of its own for this turn."""
        room = self.config.max_context - self._length
        seed = None if base.seed is None else (base.seed * 1_000_003 + len(self.turns)) % 2**31
        limit = min(base.max_tokens, self.config.max_turn_tokens, room)
        return replace(base, max_tokens=limit, seed=seed)

    # -- events -----------------------------------------------------------------

    def begin(self, overview: Clip, pictures: tuple[Frame, ...] = (), more: tuple[Clip, ...] = ()) -> None:
        """The overview has been decoded, those of further videos, and the pictures of the question."""
        self._expect(State.NEW)
        # Where the first round is the last one, there is no reply that could say so.
        notice = self.wire.wording.notice if self.config.max_rounds == 1 else ""
        question, chat = f"{self.task.question}{notice}", self.task.chat
        first = chat.past[0][0] if chat.past else question
        further = tuple(clip.frames for clip in more)
        opening = self.wire.question_text(first, overview.frames, self.subtitles, pictures, further)
        said = self.wire.conversation(opening, question, chat)
        shown = (*overview.frames, *(frame for frames in further for frame in frames), *pictures)
        self._begun = self.wire.begun(said, shown)
        self._messages = [Message(role, text) for role, text in said]
        self._messages[1] = Message("user", opening, shown)
        self._compact = list(self._begun.compact_ids)
        self._frames: list[Frame] = list(shown)
        self._length = self._begun.length
        self.state = State.ACT
        if self._length + MIN_TURN_TOKENS > self.config.max_context:
            self._over(Status.TRUNCATED)

    def act(self, action: Sampled | Written, seconds: float = 0.0) -> Zoom | None:
        """The policy took a turn; returns the zoom to carry out, if it asked for one that can be."""
        self._expect(State.ACT)
        text = self.wire.text_of(action.token_ids)
        said = read_turn(
            text,
            duration_s=self.video.duration_s,
            max_frames=self.config.max_zoom_frames,
            inclusive=self.config.format == "compat",
            fixed_fps=self.config.zoom_fps,
            more_s=[video.duration_s for video in self.more],
        )
        zoom = self._admit(said.zoom) if isinstance(said.zoom, Zoom) else said.zoom
        self._pending = Turn(action, text, zoom, None, (seconds, 0.0), said.asked_fps)
        if isinstance(action, Sampled) and action.stop == "length":
            self._over(Status.TRUNCATED)
        elif zoom is None:
            self.answer = said.answer
            self._over(Status.NO_ANSWER if said.answer is None else Status.ANSWERED)
        elif self._is_last_round:
            self._over(Status.NO_ANSWER)
        elif isinstance(zoom, ZoomRefused):
            self._refuse(zoom)
        else:
            self.state = State.LOOK
            return zoom
        return None

    def clip(self, clip: Clip, seconds: float = 0.0) -> None:
        """The clip that was asked for has been decoded."""
        self._expect(State.LOOK)
        which = self._looking.video if self.more and self._looking else None
        # Subtitles are those of the first video.
        subtitles = () if which else self.subtitles
        text = self.wire.reply_text(
            clip.frames, last_round=self._notice_due, subtitles=subtitles, video=which
        )
        reply = self.wire.reply(text, clip.frames, ended=self._ended)
        self._pending = replace(self._pending, seconds=(self._pending.seconds[0], seconds))
        if not self._fits(reply):
            full = "the context has no room for more frames; answer now"
            self._refuse(ZoomRefused(ZoomFault.NO_BUDGET, full, self._looking))
        else:
            self._append(reply, Message("user", text, clip.frames), clip.frames)

    def no_clip(self, message: str) -> None:
        """The clip that was asked for cannot be decoded; `message` is fit for the model."""
        self._expect(State.LOOK)
        self._refuse(ZoomRefused(ZoomFault.DECODE, message, self._looking))

    def trajectory(self, *, worker: str = "", seconds: float = 0.0) -> Trajectory:
        """What was played. Raises if it is not over."""
        self._expect(State.OVER)
        return Trajectory(
            id=self.id,
            wire=self.wire.name,
            prompt=self._begun,
            turns=tuple(self.turns),
            status=self.status,
            answer=self.answer,
            worker=worker,
            seconds=seconds,
        )

    # -- parts --------------------------------------------------------------------

    @property
    def _is_last_round(self) -> bool:
        return len(self.turns) + 1 >= self.config.max_rounds

    @property
    def _notice_due(self) -> bool:
        """The reply to the pending turn opens the last round."""
        return len(self.turns) + 2 >= self.config.max_rounds

    @property
    def _looking(self) -> Zoom | None:
        """What the pending turn asked for, where it is to be carried out."""
        return self._pending.zoom if isinstance(self._pending.zoom, Zoom) else None

    @property
    def _ended(self) -> bool:
        ids = self._pending.action.token_ids
        return bool(ids) and ids[-1] == self.wire.end_id

    def _admit(self, zoom: Zoom) -> Zoom | ZoomRefused:
        if self._is_last_round:
            return ZoomRefused(ZoomFault.LAST_ROUND, "no zoom is left; answer from what you have seen", zoom)
        if len(self._frames) + zoom.frame_count > self.config.max_images:
            left = self.config.max_images - len(self._frames)
            return ZoomRefused(
                ZoomFault.NO_BUDGET, f"only {left} more frames can be shown in this conversation", zoom
            )
        return zoom

    def _refuse(self, refused: ZoomRefused) -> None:
        decode = refused.fault is ZoomFault.DECODE
        text = self.wire.refusal_text(refused.message, last_round=self._notice_due, decode=decode)
        reply = self.wire.reply(text, (), ended=self._ended)
        self._pending = replace(self._pending, zoom=refused)
        if self._fits(reply):
            self._append(reply, Message("user", text), ())
        else:
            self._over(Status.TRUNCATED)

    def _fits(self, reply: Context) -> bool:
        said = len(self._pending.action.token_ids)
        needed = self._length + said + reply.length + MIN_TURN_TOKENS
        return needed <= self.config.max_context

    def _append(self, reply: Context, message: Message, frames: tuple[Frame, ...]) -> None:
        turn = replace(self._pending, reply=reply)
        self.turns.append(turn)
        self._compact += [*turn.action.token_ids, *reply.compact_ids]
        self._length += len(turn.action.token_ids) + reply.length
        self._frames += frames
        self._messages += [Message("assistant", turn.text), message]
        self.state = State.ACT

    def _over(self, status: Status) -> None:
        if hasattr(self, "_pending"):
            self.turns.append(self._pending)
        self.status, self.state = status, State.OVER

    def _expect(self, state: State) -> None:
        if self.state is not state:
            raise RuntimeError(f"episode {self.id} is in state {self.state}, expected {state}")
