"""What is left of an episode once it has been played.

Token-in-token-out: sampled ids are kept as sampled, never decoded and encoded
again. Frames are kept as `FrameRef`s, never as pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from vz_ray.video.frame import FrameRef, ZoomRequest

JUDGE_FAILED_NOTE = "judge"
"""Start of a reward's note where a judge was asked and gave no verdict."""
UNPARSED_NOTE = "unparsed"
"""Start of a reward's note where the answer states no option or number; it counts as wrong."""

Grid = tuple[int, int, int]
"""Rows of patches of one image: (1, height / patch, width / patch), before merging."""

MERGE_SIZE = 2
"""Patches that become one visual token, along each side."""


def num_visual_tokens(grid: Grid) -> int:
    """Tokens that an image of this patch grid takes after merging."""
    return grid[0] * grid[1] * grid[2] // MERGE_SIZE**2


class EpisodeStatus(StrEnum):
    """How an episode ended."""

    ANSWERED = "answered"
    """The last turn holds an answer, right or wrong."""
    NO_ANSWER = "no_answer"
    """Rounds ran out, or the last turn ended without zoom or answer."""
    TRUNCATED = "truncated"
    """A turn hit its token limit, or the context or image budget ran out."""
    FAILED = "failed"
    """Not the policy's fault (a dead worker, an unreadable video): not data."""


class ZoomErrorKind(StrEnum):
    """Why a zoom was refused; each has its own error turn."""

    INVALID_JSON = "broken_json"
    WRONG_KEYS = "wrong_keys"
    NOT_NUMBERS = "not_numbers"
    NOT_FINITE = "not_finite"
    NEGATIVE = "negative"
    REVERSED = "reversed"
    EMPTY = "empty"
    OUT_OF_RANGE = "outside"
    TOO_MANY_FRAMES = "too_many_frames"
    TOO_FEW_FRAMES = "too_few_frames"
    MULTIPLE_CALLS = "two_calls"
    CALL_WITH_ANSWER = "with_answer"
    LAST_ROUND = "last_round"
    BUDGET_EXCEEDED = "no_budget"
    DECODE_ERROR = "decode"


@dataclass(frozen=True, slots=True)
class RejectedZoom:
    """A rejected zoom call.

    Attributes:
        kind: Kind of error.
        message: Error message for the model.
        requested: The parsed request; None if the call could not be parsed. It may be reversed or outside
            the video.
    """

    kind: ZoomErrorKind
    message: str
    requested: ZoomRequest | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn; the learner must apply the same temperature and ban.

    Attributes:
        temperature: 0 is greedy.
        top_p: Nucleus mass; must be 1 where log-probs are trained on.
        max_tokens: Most tokens in one turn.
        seed: Seed of this turn's draws, if fixed.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 4096
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens [start, end) of a sampled turn came from weight version `version`."""

    start: int
    end: int
    version: int


@dataclass(frozen=True, slots=True)
class SampledAction:
    """A turn that the policy sampled.

    Attributes:
        token_ids: `[T]`, end token included if, and only if, it was sampled.
        logprobs: `[T]`, natural log, of the distribution actually sampled from
            (temperature and bans applied).
        versions: Weight version by token span, covering `[0, T)`.
        sampling_params: How it was drawn.
        stop_reason: `end` (end-of-turn token), `zoom` (`</video_zoom>`) or `length`.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[VersionSpan, ...]
    sampling_params: SamplingParams
    stop_reason: str


@dataclass(frozen=True, slots=True)
class ExternalAction:
    """A turn that someone else wrote: an oracle, or a model behind an HTTP API.

    `token_ids` are its encoding under the wire format; they carry no log-probs.
    """

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenContext:
    """Tokens that the policy reads but did not sample: the prompt, a reply to a zoom.

    Attributes:
        compact_ids: One image pad per image; what the engine is given.
        grids: Patch grid of each image, in order.
        frame_refs: Frame of each image, in order.
        pad_id: The image pad; without images it may be anything.
    """

    compact_ids: tuple[int, ...]
    grids: tuple[Grid, ...] = ()
    frame_refs: tuple[FrameRef, ...] = ()
    pad_id: int = -1

    def __post_init__(self) -> None:
        slots = self.compact_ids.count(self.pad_id)
        if not slots == len(self.grids) == len(self.frame_refs):
            raise ValueError(
                f"{slots} image slots and {len(self.grids)} image grids for {len(self.frame_refs)} frames"
            )

    @property
    def expanded_ids(self) -> tuple[int, ...]:
        """One image pad per visual token; what the learner is given. Made anew: it is many times longer."""
        visual = iter(self.grids)
        expanded: list[int] = []
        for token in self.compact_ids:
            expanded += [token] * num_visual_tokens(next(visual)) if token == self.pad_id else [token]
        return tuple(expanded)

    @property
    def num_tokens(self) -> int:
        """Tokens of `expanded_ids`."""
        return len(self.compact_ids) - len(self.grids) + sum(map(num_visual_tokens, self.grids))


@dataclass(frozen=True, slots=True)
class Turn:
    """One round: what the policy said and what it got back.

    Attributes:
        action: What the policy said.
        text: `action` decoded, for parsing and for people.
        zoom: The zoom carried out, the refusal, or None if the turn asked for none.
        observation: Tokens appended after the action, the end token that was
            appended rather than sampled included; None after the last turn.
        seconds: Wall time of sampling and of fetching the clip.
        requested_fps: Frame rate that the policy asked for, where `episode.zoom_fps` set another.
    """

    action: SampledAction | ExternalAction
    text: str
    zoom: ZoomRequest | RejectedZoom | None
    observation: TokenContext | None
    seconds: tuple[float, float] = (0.0, 0.0)
    requested_fps: float | None = None


@dataclass(frozen=True, slots=True)
class EpisodeId:
    """Names one play of one sample of one task: `(iteration, task, sample)` is owed once,
    attempts count plays of it."""

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
    """The reward and its parts, logged apart (paper, section on rewards).

    Attributes:
        total: Their weighted sum.
        accuracy: How right the answer is, in `[0, 1]`.
        format: 1 for a well-formed transcript.
        tool: 1 where using the tool is paid for.
        valid: False where the sample could not be judged (a judge failed);
            such a sample drops its group and never counts as 0.
        note: Why it is invalid, or its answer wrong: a few words, the same for all of a
            kind, then `: ` and details.
        extra: Parts that not every run has, by name: `length`, `frames`, `judge_score`, and those
            of a user's own function.
    """

    total: float
    accuracy: float
    format: float
    tool: float
    valid: bool = True
    note: str = ""
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """The note without details, to be counted by."""
        return self.note.partition(": ")[0]

    @property
    def judge_failed(self) -> bool:
        """Whether a judge was asked and gave no verdict: asking again may help."""
        return not self.valid and self.reason.startswith(f"{JUDGE_FAILED_NOTE} ")


@dataclass(frozen=True, slots=True)
class Trajectory:
    """An episode as played.

    Attributes:
        id: Which sample this is.
        chat_format: Name and hash of the wire format and prompt that were used.
        prompt: System prompt, overview and question.
        turns: In order; at least one unless `status` is FAILED.
        status: How it ended.
        answer: Text of the answer span, if there was one.
        worker: Name of the rollout worker that played it.
        seconds: Wall time of the whole episode.
        reward: Filled in by the scorer.
        error: Why it failed, where it did.
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

    @property
    def contexts(self) -> tuple[TokenContext, ...]:
        """Prompt and replies, in order."""
        return (self.prompt, *(turn.observation for turn in self.turns if turn.observation is not None))

    @property
    def frame_refs(self) -> tuple[FrameRef, ...]:
        """Every frame shown, in order, one per image."""
        return tuple(ref for context in self.contexts for ref in context.frame_refs)

    @property
    def grids(self) -> tuple[Grid, ...]:
        return tuple(grid for context in self.contexts for grid in context.grids)

    @property
    def expanded_ids(self) -> tuple[int, ...]:
        """`[L]`: the whole conversation as the learner reads it."""
        ids = list(self.prompt.expanded_ids)
        for turn in self.turns:
            ids += turn.action.token_ids
            ids += turn.observation.expanded_ids if turn.observation else ()
        return tuple(ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole conversation."""
        said = sum(len(turn.action.token_ids) for turn in self.turns)
        return said + sum(context.num_tokens for context in self.contexts)

    @property
    def loss_mask(self) -> tuple[int, ...]:
        """`[L]`: 1 exactly on the tokens of the policy's own turns."""
        mask = [0] * self.prompt.num_tokens
        for turn in self.turns:
            mask += [1] * len(turn.action.token_ids)
            mask += [0] * (turn.observation.num_tokens if turn.observation else 0)
        return tuple(mask)

    @property
    def sampled_logprobs(self) -> tuple[float, ...]:
        """The engine's log-probs of the sampled tokens, in order: one per 1 in `loss_mask`."""
        return tuple(
            p for turn in self.turns if isinstance(turn.action, SampledAction) for p in turn.action.logprobs
        )

    @property
    def zooms(self) -> tuple[ZoomRequest, ...]:
        """Zooms that were carried out."""
        return tuple(turn.zoom for turn in self.turns if isinstance(turn.zoom, ZoomRequest))

    @property
    def num_zoom_calls(self) -> int:
        return sum(turn.zoom is not None for turn in self.turns)

    @property
    def retryable(self) -> bool:
        """Whether playing or judging it again may give what it lacks."""
        return self.status is EpisodeStatus.FAILED or (self.reward is not None and self.reward.judge_failed)

    @property
    def weight_versions(self) -> tuple[int, ...]:
        """Distinct versions that sampled it, ascending."""
        spans = (t.action.versions for t in self.turns if isinstance(t.action, SampledAction))
        return tuple(sorted({span.version for turn in spans for span in turn}))


@dataclass(frozen=True, slots=True)
class Group:
    """The n trajectories of one task; advantages are taken within it."""

    task_id: str
    trajectories: tuple[Trajectory, ...]

    @property
    def rewards(self) -> tuple[float, ...]:
        return tuple(t.reward.total for t in self.trajectories if t.reward is not None)
