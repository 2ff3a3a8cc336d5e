"""Trajectory types: the record of one episode.

Token in, token out: sampled ids are kept as sampled and never re-encoded. Frames are stored as
`FrameRef`s, never as pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from vz_ray.video.frame import FrameRef, ZoomRequest
from vz_ray.video.image_grid import Grid, num_visual_tokens

JUDGE_FAILED_NOTE = "judge"
"""Prefix of a reward's note if the judge failed."""
UNPARSED_NOTE = "unparsed"
"""Prefix of a reward's note if the answer contains no option or number; it counts as wrong."""


class EpisodeStatus(StrEnum):
    """How an episode ended."""

    ANSWERED = "answered"
    """The last turn contains an answer, correct or not."""
    NO_ANSWER = "no_answer"
    """The rounds were used up, or the last turn contained neither zoom call nor answer."""
    TRUNCATED = "truncated"
    """A turn reached its token limit, or the context or image budget was exhausted."""
    FAILED = "failed"
    """An infrastructure failure (lost worker, unreadable video); excluded from training."""


class ZoomErrorKind(StrEnum):
    """Why a zoom call was rejected. Each kind has its own error message for the model."""

    INVALID_JSON = "invalid_json"
    WRONG_KEYS = "wrong_keys"
    NOT_NUMBERS = "not_numbers"
    NOT_FINITE = "not_finite"
    NEGATIVE = "negative"
    REVERSED = "reversed"
    EMPTY = "empty"
    OUT_OF_RANGE = "out_of_range"
    TOO_MANY_FRAMES = "too_many_frames"
    TOO_FEW_FRAMES = "too_few_frames"
    MULTIPLE_CALLS = "multiple_calls"
    CALL_WITH_ANSWER = "call_with_answer"
    LAST_ROUND = "last_round"
    BUDGET_EXCEEDED = "budget_exceeded"
    DECODE_ERROR = "decode_error"


@dataclass(frozen=True, slots=True)
class RejectedZoom:
    """A rejected zoom call.

    Attributes:
        message: Error message for the model.
        requested: The parsed request; None if the call could not be parsed. It may be reversed or outside
            the video.
    """

    kind: ZoomErrorKind
    message: str
    requested: ZoomRequest | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters. The learner applies the same temperature and token mask.

    Attributes:
        temperature: 0 is greedy.
        top_p: Nucleus mass; must be 1 for training.
        max_tokens: Maximum tokens per turn.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 4096
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens [start, end) of a turn were sampled with weight version `version`."""

    start: int
    end: int
    version: int


@dataclass(frozen=True, slots=True)
class SampledAction:
    """Turn sampled by the policy.

    Attributes:
        token_ids: `[T]`, includes the end token only if it was sampled.
        logprobs: `[T]`, natural log, of the distribution that was sampled from (temperature and token
            mask applied).
        versions: Weight version by token span, covering `[0, T)`.
        stop_reason: `end` (end-of-turn token), `zoom` (`</video_zoom>`) or `length`.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[VersionSpan, ...]
    sampling_params: SamplingParams
    stop_reason: str


@dataclass(frozen=True, slots=True)
class ExternalAction:
    """Turn from another source, such as a scripted policy or a model behind an HTTP API.

    `token_ids` are its encoding under the chat format. There are no log-probs.
    """

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenContext:
    """Tokens that the policy reads but did not sample: the prompt or an observation.

    Attributes:
        compact_ids: One image pad per image; input of the engine.
        grids: Patch grid of each image, in order.
        frame_refs: Frame of each image, in order.
        pad_id: Token id of the image pad; unused without images.
        merge_size: Patches per side of one visual token; unused without images.

    Raises:
        ValueError: The numbers of image pads, grids and frames differ, or `merge_size` is missing.
    """

    compact_ids: tuple[int, ...]
    grids: tuple[Grid, ...] = ()
    frame_refs: tuple[FrameRef, ...] = ()
    pad_id: int = -1
    merge_size: int = 0

    def __post_init__(self) -> None:
        slots = self.compact_ids.count(self.pad_id)
        if not slots == len(self.grids) == len(self.frame_refs):
            raise ValueError(f"{slots} image slots and {len(self.grids)} image grids for {len(self.frame_refs)} frames")
        if slots and self.merge_size < 1:
            raise ValueError(f"merge_size is {self.merge_size}; a context with images needs that of the checkpoint")

    @property
    def expanded_ids(self) -> tuple[int, ...]:
        """One image pad per visual token; input of the learner. Not cached: it is many times longer."""
        visual = iter(self.grids)
        expanded: list[int] = []
        for token in self.compact_ids:
            expanded += [token] * num_visual_tokens(next(visual), self.merge_size) if token == self.pad_id else [token]
        return tuple(expanded)

    @property
    def num_tokens(self) -> int:
        """Length of `expanded_ids`."""
        visual_tokens = sum(num_visual_tokens(grid, self.merge_size) for grid in self.grids)
        return len(self.compact_ids) - len(self.grids) + visual_tokens


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the policy and the observation after it.

    Attributes:
        text: `action` decoded, after a `<think>` that the prompt opened.
        zoom: The executed zoom, the rejected zoom, or None without a zoom call.
        observation: Tokens appended after the action, including an end token that was not sampled;
            None after the last turn.
        seconds: Wall time of sampling and of fetching the clip.
        requested_fps: Frame rate in the call, if `episode.zoom_fps` overrode it.
    """

    action: SampledAction | ExternalAction
    text: str
    zoom: ZoomRequest | RejectedZoom | None
    observation: TokenContext | None
    seconds: tuple[float, float] = (0.0, 0.0)
    requested_fps: float | None = None


@dataclass(frozen=True, slots=True)
class EpisodeId:
    """Id of one attempt of one sample of one task.

    `(step, task_id, sample)` is accepted once; `attempt` counts retries.
    """

    step: int
    task_id: str
    sample: int
    attempt: int = 0

    @property
    def sample_key(self) -> tuple[int, str, int]:
        return (self.step, self.task_id, self.sample)

    def __str__(self) -> str:
        return f"{self.step}/{self.task_id}/{self.sample}#{self.attempt}"


@dataclass(frozen=True, slots=True)
class RewardParts:
    """Reward of a trajectory and its parts (paper, section on rewards).

    Attributes:
        total: Weighted sum of the parts.
        accuracy: Correctness of the answer in `[0, 1]`.
        format: 1 for a well-formed transcript.
        tool: 1 if tool use is rewarded.
        valid: False if the judge failed. The sample's group is then dropped; the sample never counts as 0.
        note: Reason for an invalid reward or a wrong answer: a fixed phrase, then `: ` and details.
        extra: Optional parts by name: `length`, `frames`, `judge_score`, and parts of a user function.
        turns: Reward of each turn, not part of `total`; empty without weights in `reward.turns`.
    """

    total: float
    accuracy: float
    format: float
    tool: float
    valid: bool = True
    note: str = ""
    extra: dict[str, float] = field(default_factory=dict)
    turns: tuple[float, ...] = ()

    @property
    def reason(self) -> str:
        """The note without details, for counting."""
        return self.note.partition(": ")[0]

    @property
    def judge_failed(self) -> bool:
        """Whether the judge failed. A retry may succeed."""
        return not self.valid and self.reason.startswith(f"{JUDGE_FAILED_NOTE} ")


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Record of an episode.

    Attributes:
        chat_format: Name and hash of the chat format and prompt template.
        prompt: System prompt, overview and question.
        turns: Turns in order; at least one unless `status` is FAILED.
        answer: Text of the answer span; None without one.
        worker: Name of the rollout worker.
        seconds: Wall time of the episode.
        reward: Reward; None before scoring.
        error: Reason of a failure.
        extra: Additional JSON values, for example the gate decision.
        teacher_logprobs: `[S]` log-probs of the teacher for the sampled tokens, one per 1 in `loss_mask`; empty
            without a teacher.
    """

    id: EpisodeId
    chat_format: str
    prompt: TokenContext
    turns: tuple[Turn, ...]
    status: EpisodeStatus
    answer: str | None = None
    worker: str = ""
    seconds: float = 0.0
    reward: RewardParts | None = None
    error: str = ""
    extra: dict[str, object] = field(default_factory=dict)
    teacher_logprobs: tuple[float, ...] = ()

    @property
    def contexts(self) -> tuple[TokenContext, ...]:
        """Prompt and observations, in order."""
        return (self.prompt, *(turn.observation for turn in self.turns if turn.observation is not None))

    @property
    def frame_refs(self) -> tuple[FrameRef, ...]:
        """All frames in order, one per image."""
        return tuple(ref for context in self.contexts for ref in context.frame_refs)

    @property
    def grids(self) -> tuple[Grid, ...]:
        return tuple(grid for context in self.contexts for grid in context.grids)

    @property
    def compact_ids(self) -> tuple[int, ...]:
        """The complete conversation as input of an engine, with one image pad per image."""
        ids = list(self.prompt.compact_ids)
        for turn in self.turns:
            ids += turn.action.token_ids
            ids += turn.observation.compact_ids if turn.observation else ()
        return tuple(ids)

    @property
    def expanded_ids(self) -> tuple[int, ...]:
        """`[L]`, the complete conversation as input of the learner."""
        ids = list(self.prompt.expanded_ids)
        for turn in self.turns:
            ids += turn.action.token_ids
            ids += turn.observation.expanded_ids if turn.observation else ()
        return tuple(ids)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the conversation."""
        policy_tokens = sum(len(turn.action.token_ids) for turn in self.turns)
        return policy_tokens + sum(context.num_tokens for context in self.contexts)

    @property
    def loss_mask(self) -> tuple[int, ...]:
        """`[L]`, 1 exactly on the tokens of the policy's turns."""
        mask = [0] * self.prompt.num_tokens
        for turn in self.turns:
            mask += [1] * len(turn.action.token_ids)
            mask += [0] * (turn.observation.num_tokens if turn.observation else 0)
        return tuple(mask)

    @property
    def sampled_logprobs(self) -> tuple[float, ...]:
        """The engine's log-probs of the sampled tokens, in order; one per 1 in `loss_mask`."""
        return tuple(p for turn in self.turns if isinstance(turn.action, SampledAction) for p in turn.action.logprobs)

    @property
    def zooms(self) -> tuple[ZoomRequest, ...]:
        """Executed zooms."""
        return tuple(turn.zoom for turn in self.turns if isinstance(turn.zoom, ZoomRequest))

    @property
    def num_zoom_calls(self) -> int:
        return sum(turn.zoom is not None for turn in self.turns)

    @property
    def num_zoom_frames(self) -> int:
        """Number of frames that zooms returned; the policy does not choose those of the overview."""
        return len(self.frame_refs) - len(self.prompt.frame_refs)

    @property
    def retryable(self) -> bool:
        """Whether a retry of the episode or of the judge may succeed."""
        return self.status is EpisodeStatus.FAILED or (self.reward is not None and self.reward.judge_failed)

    @property
    def weight_versions(self) -> tuple[int, ...]:
        """Distinct weight versions of the sampled tokens, ascending."""
        actions = (turn.action for turn in self.turns if isinstance(turn.action, SampledAction))
        return tuple(sorted({span.version for action in actions for span in action.versions}))


@dataclass(frozen=True, slots=True)
class Group:
    """The trajectories of one task, as in GRPO. Advantages are computed within a group."""

    task_id: str
    trajectories: tuple[Trajectory, ...]

    @property
    def rewards(self) -> tuple[float, ...]:
        return tuple(t.reward.total for t in self.trajectories if t.reward is not None)
