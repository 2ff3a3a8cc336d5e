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
from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.protocols import Prompt, PromptMessage
from vz_ray.env.task import Task
from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    ExternalAction,
    RejectedZoom,
    SampledAction,
    SamplingParams,
    TokenContext,
    Trajectory,
    Turn,
    ZoomErrorKind,
)
from vz_ray.env.zoom_call import parse_turn
from vz_ray.video.frame import Clip, Frame, OverviewRequest, VideoInfo, ZoomRequest
from vz_ray.video.subtitles import Subtitle

MIN_TURN_TOKENS = 16
"""A turn with less room than this is not begun: it could not hold an answer."""


class EnvState(StrEnum):
    NEW = "new"
    AWAITING_TURN = "act"
    AWAITING_CLIP = "look"
    DONE = "over"


@dataclass
class ZoomEnv:
    """One question being played."""

    id: EpisodeId
    task: Task
    video: VideoInfo
    chat_format: ChatFormat
    config: EpisodeConfig
    subtitles: tuple[Subtitle, ...] = ()
    extra_videos: tuple[VideoInfo, ...] = ()
    """Further videos that the question is about."""
    state: EnvState = EnvState.NEW
    turns: list[Turn] = field(default_factory=list)
    status: EpisodeStatus = EpisodeStatus.NO_ANSWER
    answer: str | None = None

    # -- what it needs next ---------------------------------------------------

    @property
    def overview_request(self) -> OverviewRequest:
        """Of each video: several share what may be shown."""
        c = self.config
        # Pictures of the question are images too.
        frames = min(c.overview_frames, c.max_images - len(self.task.images))
        return OverviewRequest(
            c.overview_fps, max(1, frames // (1 + len(self.extra_videos))), c.overview_spread
        )

    @property
    def prompt(self) -> Prompt:
        """The conversation so far, ready to be continued by the policy."""
        return Prompt(tuple(self._compact_ids), tuple(self._frames), tuple(self._messages))

    def turn_sampling_params(self, base: SamplingParams) -> SamplingParams:
        """`base` cut to what the context still holds, with a seed of its own for this turn."""
        room = self.config.max_context - self._num_tokens
        seed = None if base.seed is None else (base.seed * 1_000_003 + len(self.turns)) % 2**31
        limit = min(base.max_tokens, self.config.max_turn_tokens, room)
        return replace(base, max_tokens=limit, seed=seed)

    # -- events -----------------------------------------------------------------

    def start(
        self, overview: Clip, question_images: tuple[Frame, ...] = (), extra_overviews: tuple[Clip, ...] = ()
    ) -> None:
        """The overview has been decoded, those of further videos, and the pictures of the question."""
        self._require_state(EnvState.NEW)
        # Where the first round is the last one, there is no reply that could say so.
        notice = self.chat_format.template.notice if self.config.max_rounds == 1 else ""
        question, chat = f"{self.task.question}{notice}", self.task.chat_history
        first = chat.turns[0][0] if chat.turns else question
        further = tuple(clip.frames for clip in extra_overviews)
        opening = self.chat_format.format_question(
            first, overview.frames, self.subtitles, question_images, further
        )
        said = self.chat_format.build_messages(opening, question, chat)
        shown = (*overview.frames, *(frame for frames in further for frame in frames), *question_images)
        self._initial_context = self.chat_format.encode_messages(said, shown)
        self._messages = [PromptMessage(role, text) for role, text in said]
        self._messages[1] = PromptMessage("user", opening, shown)
        self._compact_ids = list(self._initial_context.compact_ids)
        self._frames: list[Frame] = list(shown)
        self._num_tokens = self._initial_context.num_tokens
        self.state = EnvState.AWAITING_TURN
        if self._num_tokens + MIN_TURN_TOKENS > self.config.max_context:
            self._finish(EpisodeStatus.TRUNCATED)

    def step(self, action: SampledAction | ExternalAction, seconds: float = 0.0) -> ZoomRequest | None:
        """The policy took a turn; returns the zoom to carry out, if it asked for one that can be."""
        self._require_state(EnvState.AWAITING_TURN)
        text = self.chat_format.decode_turn(action.token_ids)
        said = parse_turn(
            text,
            duration_s=self.video.duration_s,
            max_frames=self.config.max_zoom_frames,
            inclusive=self.config.chat_format == "compat",
            fixed_fps=self.config.zoom_fps,
            extra_durations_s=[video.duration_s for video in self.extra_videos],
        )
        zoom = self._check_budget(said.zoom) if isinstance(said.zoom, ZoomRequest) else said.zoom
        self._pending_turn = Turn(action, text, zoom, None, (seconds, 0.0), said.requested_fps)
        if isinstance(action, SampledAction) and action.stop_reason == "length":
            self._finish(EpisodeStatus.TRUNCATED)
        elif zoom is None:
            self.answer = said.answer
            self._finish(EpisodeStatus.NO_ANSWER if said.answer is None else EpisodeStatus.ANSWERED)
        elif self._is_last_round:
            self._finish(EpisodeStatus.NO_ANSWER)
        elif isinstance(zoom, RejectedZoom):
            self._refuse(zoom)
        else:
            self.state = EnvState.AWAITING_CLIP
            return zoom
        return None

    def add_clip(self, clip: Clip, seconds: float = 0.0) -> None:
        """The clip that was asked for has been decoded."""
        self._require_state(EnvState.AWAITING_CLIP)
        which = self._pending_zoom.video if self.extra_videos and self._pending_zoom else None
        # Subtitles are those of the first video.
        subtitles = () if which else self.subtitles
        text = self.chat_format.format_clip(
            clip.frames, last_round=self._next_round_is_last, subtitles=subtitles, video=which
        )
        reply = self.chat_format.encode_observation(text, clip.frames, end_sampled=self._sampled_end_token)
        self._pending_turn = replace(self._pending_turn, seconds=(self._pending_turn.seconds[0], seconds))
        if not self._fits(reply):
            full = "the context has no room for more frames; answer now"
            self._refuse(RejectedZoom(ZoomErrorKind.BUDGET_EXCEEDED, full, self._pending_zoom))
        else:
            self._append(reply, PromptMessage("user", text, clip.frames), clip.frames)

    def add_decode_error(self, message: str) -> None:
        """The clip that was asked for cannot be decoded; `message` is fit for the model."""
        self._require_state(EnvState.AWAITING_CLIP)
        self._refuse(RejectedZoom(ZoomErrorKind.DECODE_ERROR, message, self._pending_zoom))

    def trajectory(self, *, worker: str = "", seconds: float = 0.0) -> Trajectory:
        """What was played. Raises if it is not over."""
        self._require_state(EnvState.DONE)
        return Trajectory(
            id=self.id,
            chat_format=self.chat_format.name,
            prompt=self._initial_context,
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
    def _next_round_is_last(self) -> bool:
        """The reply to the pending turn opens the last round."""
        return len(self.turns) + 2 >= self.config.max_rounds

    @property
    def _pending_zoom(self) -> ZoomRequest | None:
        """What the pending turn asked for, where it is to be carried out."""
        return self._pending_turn.zoom if isinstance(self._pending_turn.zoom, ZoomRequest) else None

    @property
    def _sampled_end_token(self) -> bool:
        ids = self._pending_turn.action.token_ids
        return bool(ids) and ids[-1] == self.chat_format.end_id

    def _check_budget(self, zoom: ZoomRequest) -> ZoomRequest | RejectedZoom:
        if self._is_last_round:
            return RejectedZoom(
                ZoomErrorKind.LAST_ROUND, "no zoom is left; answer from what you have seen", zoom
            )
        if len(self._frames) + zoom.num_frames > self.config.max_images:
            left = self.config.max_images - len(self._frames)
            return RejectedZoom(
                ZoomErrorKind.BUDGET_EXCEEDED,
                f"only {left} more frames can be shown in this conversation",
                zoom,
            )
        return zoom

    def _refuse(self, refused: RejectedZoom) -> None:
        decode = refused.kind is ZoomErrorKind.DECODE_ERROR
        text = self.chat_format.format_error(
            refused.message, last_round=self._next_round_is_last, decode=decode
        )
        reply = self.chat_format.encode_observation(text, (), end_sampled=self._sampled_end_token)
        self._pending_turn = replace(self._pending_turn, zoom=refused)
        if self._fits(reply):
            self._append(reply, PromptMessage("user", text), ())
        else:
            self._finish(EpisodeStatus.TRUNCATED)

    def _fits(self, reply: TokenContext) -> bool:
        said = len(self._pending_turn.action.token_ids)
        needed = self._num_tokens + said + reply.num_tokens + MIN_TURN_TOKENS
        return needed <= self.config.max_context

    def _append(self, reply: TokenContext, message: PromptMessage, frames: tuple[Frame, ...]) -> None:
        turn = replace(self._pending_turn, observation=reply)
        self.turns.append(turn)
        self._compact_ids += [*turn.action.token_ids, *reply.compact_ids]
        self._num_tokens += len(turn.action.token_ids) + reply.num_tokens
        self._frames += frames
        self._messages += [PromptMessage("assistant", turn.text), message]
        self.state = EnvState.AWAITING_TURN

    def _finish(self, status: EpisodeStatus) -> None:
        if hasattr(self, "_pending_turn"):
            self.turns.append(self._pending_turn)
        self.status, self.state = status, EnvState.DONE

    def _require_state(self, state: EnvState) -> None:
        if self.state is not state:
            raise RuntimeError(f"episode {self.id} is in state {self.state}, expected {state}")
