"""The environment of one episode as a pure state machine.

    start(overview) -> AWAITING_TURN -- step(turn) --> DONE
                        ^        |
                        |        v zoom accepted
                        +-- AWAITING_CLIP <-- add_clip(...) or add_decode_error(...)

A rejected zoom call adds an error message and stays in AWAITING_TURN. Appending is atomic: tokens,
grids and frame refs of an observation are added together after the budget check, or not at all.
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
"""Minimum free context to start a turn; less could not hold an answer."""


class EnvState(StrEnum):
    NEW = "new"
    AWAITING_TURN = "awaiting_turn"
    AWAITING_CLIP = "awaiting_clip"
    DONE = "done"


@dataclass
class ZoomEnv:
    """State of one episode.

    Attributes:
        video: First video of the task; `subtitles` belong to it.
        extra_videos: Further videos of the task.
        turns: Completed turns.
        status: Result; valid in state DONE.
        answer: Text of the answer span.
    """

    id: EpisodeId
    task: Task
    video: VideoInfo
    chat_format: ChatFormat
    config: EpisodeConfig
    subtitles: tuple[Subtitle, ...] = ()
    extra_videos: tuple[VideoInfo, ...] = ()
    state: EnvState = EnvState.NEW
    turns: list[Turn] = field(default_factory=list)
    status: EpisodeStatus = EpisodeStatus.NO_ANSWER
    answer: str | None = None

    # -- requests -----------------------------------------------------------------

    @property
    def overview_request(self) -> OverviewRequest:
        """Overview request of each video. Several videos share the frame budget."""
        config = self.config
        # Question images count against max_images.
        frames = min(config.overview_frames, config.max_images - len(self.task.images))
        return OverviewRequest(
            config.overview_fps, max(1, frames // (1 + len(self.extra_videos))), config.overview_spread
        )

    @property
    def prompt(self) -> Prompt:
        """The conversation so far, as input of the policy."""
        return Prompt(
            tuple(self._compact_ids),
            tuple(self._frames),
            tuple(self._messages),
            in_reasoning=self.chat_format.opens_reasoning,
        )

    def turn_sampling_params(self, base: SamplingParams) -> SamplingParams:
        """Limit `max_tokens` to the free context and derive the seed of this turn."""
        free_tokens = self.config.max_context - self._num_tokens
        seed = None if base.seed is None else (base.seed * 1_000_003 + len(self.turns)) % 2**31
        limit = min(base.max_tokens, self.config.max_turn_tokens, free_tokens)
        return replace(base, max_tokens=limit, seed=seed)

    # -- events -----------------------------------------------------------------

    def start(
        self, overview: Clip, question_images: tuple[Frame, ...] = (), extra_overviews: tuple[Clip, ...] = ()
    ) -> None:
        """Start the episode with the decoded overviews and question images."""
        self._require_state(EnvState.NEW)
        # If the first round is the last one, no observation can contain the notice.
        notice = self.chat_format.template.notice if self.config.max_rounds == 1 else ""
        question, chat = f"{self.task.question}{notice}", self.task.chat_history
        first_question = chat.turns[0][0] if chat.turns else question
        extra_frames = tuple(clip.frames for clip in extra_overviews)
        opening = self.chat_format.format_question(
            first_question, overview.frames, self.subtitles, question_images, extra_frames
        )
        messages = self.chat_format.build_messages(opening, question, chat)
        frames = (*overview.frames, *(f for clip in extra_overviews for f in clip.frames), *question_images)
        self._initial_context = self.chat_format.encode_messages(messages, frames)
        self._messages = [PromptMessage(role, text) for role, text in messages]
        self._messages[1] = PromptMessage("user", opening, frames)
        self._compact_ids = list(self._initial_context.compact_ids)
        self._frames: list[Frame] = list(frames)
        self._num_tokens = self._initial_context.num_tokens
        self.state = EnvState.AWAITING_TURN
        if self._num_tokens + MIN_TURN_TOKENS > self.config.max_context:
            self._finish(EpisodeStatus.TRUNCATED)

    def step(self, action: SampledAction | ExternalAction, seconds: float = 0.0) -> ZoomRequest | None:
        """Apply a turn of the policy. Return the request to decode; None if the turn has no accepted zoom call."""
        self._require_state(EnvState.AWAITING_TURN)
        text = self.chat_format.decode_turn(action.token_ids)
        parsed = parse_turn(
            text,
            duration_s=self.video.duration_s,
            max_frames=self.config.max_zoom_frames,
            inclusive=self.config.chat_format == "compat",
            fixed_fps=self.config.zoom_fps,
            extra_durations_s=[video.duration_s for video in self.extra_videos],
            must_close_reasoning=self.chat_format.opens_reasoning,
        )
        zoom = self._check_budget(parsed.zoom) if isinstance(parsed.zoom, ZoomRequest) else parsed.zoom
        self._pending_turn = Turn(action, text, zoom, None, (seconds, 0.0), parsed.requested_fps)
        if isinstance(action, SampledAction) and action.stop_reason == "length":
            self._finish(EpisodeStatus.TRUNCATED)
        elif zoom is None:
            self.answer = parsed.answer
            self._finish(EpisodeStatus.NO_ANSWER if parsed.answer is None else EpisodeStatus.ANSWERED)
        elif self._is_last_round:
            self._finish(EpisodeStatus.NO_ANSWER)
        elif isinstance(zoom, RejectedZoom):
            self._reject(zoom)
        else:
            self.state = EnvState.AWAITING_CLIP
            return zoom
        return None

    def add_clip(self, clip: Clip, seconds: float = 0.0) -> None:
        """Add the requested clip, or an error message if the context has no room for it."""
        self._require_state(EnvState.AWAITING_CLIP)
        video = self._pending_zoom.video if self.extra_videos and self._pending_zoom else None
        # Only the first video has subtitles.
        subtitles = () if video else self.subtitles
        text = self.chat_format.format_clip(
            clip.frames, last_round=self._next_round_is_last, subtitles=subtitles, video=video
        )
        observation = self.chat_format.encode_observation(text, clip.frames, end_sampled=self._sampled_end_token)
        self._pending_turn = replace(self._pending_turn, seconds=(self._pending_turn.seconds[0], seconds))
        if not self._fits(observation):
            message = "the context has no room for more frames; answer now"
            self._reject(RejectedZoom(ZoomErrorKind.BUDGET_EXCEEDED, message, self._pending_zoom))
        else:
            self._append(observation, PromptMessage("user", text, clip.frames), clip.frames)

    def add_decode_error(self, message: str) -> None:
        """Add an error message for a clip that cannot be decoded. The model reads `message`."""
        self._require_state(EnvState.AWAITING_CLIP)
        self._reject(RejectedZoom(ZoomErrorKind.DECODE_ERROR, message, self._pending_zoom))

    def trajectory(self, *, worker: str = "", seconds: float = 0.0) -> Trajectory:
        """Return the trajectory. Requires state DONE."""
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

    # -- implementation -----------------------------------------------------------

    @property
    def _is_last_round(self) -> bool:
        return len(self.turns) + 1 >= self.config.max_rounds

    @property
    def _next_round_is_last(self) -> bool:
        """Whether the observation after the pending turn starts the last round."""
        return len(self.turns) + 2 >= self.config.max_rounds

    @property
    def _pending_zoom(self) -> ZoomRequest | None:
        """Accepted zoom of the pending turn."""
        return self._pending_turn.zoom if isinstance(self._pending_turn.zoom, ZoomRequest) else None

    @property
    def _sampled_end_token(self) -> bool:
        ids = self._pending_turn.action.token_ids
        return bool(ids) and ids[-1] == self.chat_format.end_id

    def _check_budget(self, zoom: ZoomRequest) -> ZoomRequest | RejectedZoom:
        if self._is_last_round:
            return RejectedZoom(ZoomErrorKind.LAST_ROUND, "no zoom is left; answer from what you have seen", zoom)
        if len(self._frames) + zoom.num_frames > self.config.max_images:
            free_images = self.config.max_images - len(self._frames)
            return RejectedZoom(
                ZoomErrorKind.BUDGET_EXCEEDED,
                f"only {free_images} more frames can be shown in this conversation",
                zoom,
            )
        return zoom

    def _reject(self, rejected: RejectedZoom) -> None:
        decode = rejected.kind is ZoomErrorKind.DECODE_ERROR
        text = self.chat_format.format_error(rejected.message, last_round=self._next_round_is_last, decode=decode)
        observation = self.chat_format.encode_observation(text, (), end_sampled=self._sampled_end_token)
        self._pending_turn = replace(self._pending_turn, zoom=rejected)
        if self._fits(observation):
            self._append(observation, PromptMessage("user", text), ())
        else:
            self._finish(EpisodeStatus.TRUNCATED)

    def _fits(self, observation: TokenContext) -> bool:
        turn_tokens = len(self._pending_turn.action.token_ids)
        needed = self._num_tokens + turn_tokens + observation.num_tokens + MIN_TURN_TOKENS
        return needed <= self.config.max_context

    def _append(self, observation: TokenContext, message: PromptMessage, frames: tuple[Frame, ...]) -> None:
        turn = replace(self._pending_turn, observation=observation)
        self.turns.append(turn)
        self._compact_ids += [*turn.action.token_ids, *observation.compact_ids]
        self._num_tokens += len(turn.action.token_ids) + observation.num_tokens
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
