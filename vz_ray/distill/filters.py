"""Filters from teacher episodes to the data set.

faults -> pass rate -> held-out sets -> duplicates -> task limit -> pattern balance -> turn balance
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from blake3 import blake3

from vz_ray.config.distill import FilterConfig
from vz_ray.data.episode_record import EpisodeRecord
from vz_ray.data.sft_file import IMAGE_MARKER
from vz_ray.distill.decontamination import HeldOutSets, Words, episode_video_identity, normalize_words
from vz_ray.distill.teacher_runner import PREFIX_TURNS
from vz_ray.distill.zoom_patterns import ZoomPattern, classify_pattern
from vz_ray.env.trajectory import EpisodeStatus, RejectedZoom, ZoomErrorKind
from vz_ray.rewards import is_well_formed
from vz_ray.video.frame import ZoomRequest


@dataclass(frozen=True, slots=True)
class DroppedEpisode:
    """Dropped episode and the reason, which the data card counts."""

    episode_id: str
    reason: str


FilterResult = tuple[list[EpisodeRecord], list[DroppedEpisode]]
"""Kept and dropped episodes."""


@dataclass(frozen=True, slots=True)
class CurationResult:
    """Result of the filter pipeline.

    Attributes:
        kept: Kept episodes, ordered by task and attempt.
        dropped: All other episodes.
        pass_rates: Share of correct answers by task id.
    """

    kept: list[EpisodeRecord]
    dropped: list[DroppedEpisode]
    pass_rates: dict[str, float]


def curate(
    records: Sequence[EpisodeRecord],
    config: FilterConfig,
    held_out: HeldOutSets,
    *,
    max_zoom_frames: int,
    seed: int,
) -> CurationResult:
    """Apply all filters. Turn balance runs last, so pattern shares may exceed their maximum slightly."""
    rates = compute_pass_rates(records)
    kept, dropped = list(records), list[DroppedEpisode]()
    filters: list[Callable[[list[EpisodeRecord]], FilterResult]] = [
        lambda episodes: split_episodes(episodes, lambda record: find_fault(record, config, max_zoom_frames)),
        lambda episodes: filter_by_pass_rate(episodes, rates, config),
        lambda episodes: decontaminate(episodes, held_out, config.max_ngram_overlap),
        deduplicate,
        lambda episodes: limit_per_task(episodes, config.max_per_task),
        lambda episodes: balance(
            episodes,
            lambda record: classify_pattern(record.trajectory),
            config.max_pattern_share,
            seed=seed,
            reason="pattern limit",
        ),
        lambda episodes: balance(
            episodes,
            lambda record: len(record.trajectory.turns),
            config.max_turns_share,
            seed=seed,
            reason="turn-count limit",
        ),
    ]
    for apply_filter in filters:
        kept, newly_dropped = apply_filter(kept)
        dropped += newly_dropped
    return CurationResult(kept, dropped, rates)


def split_episodes(records: Sequence[EpisodeRecord], find_reason: Callable[[EpisodeRecord], str]) -> FilterResult:
    """Drop each episode for which `find_reason` returns a reason; an empty reason keeps it."""
    kept, dropped = [], []
    for record in records:
        if reason := find_reason(record):
            dropped.append(DroppedEpisode(str(record.trajectory.id), reason))
        else:
            kept.append(record)
    return kept, dropped


def count_prefix_turns(record: EpisodeRecord) -> int:
    """Return the number of leading turns that the policy generated before the teacher took over."""
    prefix_turns = record.trajectory.extra.get(PREFIX_TURNS, 0)
    return prefix_turns if isinstance(prefix_turns, int) else 0


def find_fault(record: EpisodeRecord, config: FilterConfig, max_zoom_frames: int) -> str:
    """Return why an episode must not be imitated; empty if it may be. Checks the teacher's turns only."""
    trajectory = record.trajectory
    teacher_turns = trajectory.turns[count_prefix_turns(record) :]
    reward = trajectory.reward
    if trajectory.status is EpisodeStatus.FAILED:
        return f"failed: {trajectory.error.partition(':')[0]}"
    if reward is None or not reward.valid:
        return "not scored"
    if trajectory.status is EpisodeStatus.TRUNCATED:
        return "truncated"
    if trajectory.status is EpisodeStatus.NO_ANSWER:
        return _no_answer_reason(teacher_turns[-1].zoom if teacher_turns else None)
    if reward.accuracy != 1:
        return "wrong answer"
    if any(IMAGE_MARKER in turn.text for turn in trajectory.turns):
        return f"text contains {IMAGE_MARKER}"
    if config.require_format and not is_well_formed([turn.text for turn in teacher_turns], max_zoom_frames):
        return "bad format"
    if config.require_zoom and not any(isinstance(turn.zoom, ZoomRequest) for turn in teacher_turns):
        return "did not zoom"
    return ""


def _no_answer_reason(last_call: ZoomRequest | RejectedZoom | None) -> str:
    if isinstance(last_call, RejectedZoom) and last_call.kind is ZoomErrorKind.LAST_ROUND:
        return "zoomed until the last round"
    return "invalid call in the last turn" if last_call else "no answer"


def compute_pass_rates(records: Sequence[EpisodeRecord]) -> dict[str, float]:
    """Return the share of correct answers among the scored attempts of each task."""
    correct: defaultdict[str, list[bool]] = defaultdict(list)
    for record in records:
        reward = record.trajectory.reward
        if record.trajectory.status is not EpisodeStatus.FAILED and reward is not None and reward.valid:
            correct[record.task.task_id].append(reward.accuracy == 1)
    return {task: sum(attempts) / len(attempts) for task, attempts in correct.items()}


def filter_by_pass_rate(
    records: Sequence[EpisodeRecord], rates: dict[str, float], config: FilterConfig
) -> FilterResult:
    """Keep episodes of tasks with a pass rate between `min_pass_rate` and `max_pass_rate`."""

    def find_reason(record: EpisodeRecord) -> str:
        rate = rates[record.task.task_id]
        if rate < config.min_pass_rate:
            return "task too hard"
        return "task too easy" if rate > config.max_pass_rate else ""

    return split_episodes(records, find_reason)


def decontaminate(records: Sequence[EpisodeRecord], held_out: HeldOutSets, overlap_threshold: float) -> FilterResult:
    """Drop episodes with a held-out video or question. A threshold of 0 skips the questions."""

    def find_reason(record: EpisodeRecord) -> str:
        question = record.task.question
        if held_out.has_video(episode_video_identity(record)):
            return "held-out video"
        if overlap_threshold and held_out.has_question(question):
            return "held-out question"
        if overlap_threshold and held_out.max_overlap(question) >= overlap_threshold:
            return "near-duplicate of a held-out question"
        return ""

    return split_episodes(records, find_reason)


def deduplicate(records: Sequence[EpisodeRecord]) -> FilterResult:
    """Keep one task per video and question, and each transcript of the task once."""
    first_task: dict[tuple[str, Words], str] = {}
    transcripts: set[tuple[str, Words, tuple[Words, ...]]] = set()

    def find_reason(record: EpisodeRecord) -> str:
        identity = episode_video_identity(record)
        question = (identity.content_hash or identity.name, normalize_words(record.task.question))
        transcript = (*question, tuple(normalize_words(turn.text) for turn in record.trajectory.turns))
        if first_task.setdefault(question, record.task.task_id) != record.task.task_id:
            return "duplicate question"
        if transcript in transcripts:
            return "duplicate transcript"
        transcripts.add(transcript)
        return ""

    return split_episodes(records, find_reason)


def limit_per_task(records: Sequence[EpisodeRecord], max_per_task: int) -> FilterResult:
    """Keep at most `max_per_task` episodes per task: different zoom patterns first, then in order."""
    by_task: defaultdict[str, list[EpisodeRecord]] = defaultdict(list)
    for record in records:
        by_task[record.task.task_id].append(record)
    chosen = [record for group in by_task.values() for record in _interleave_patterns(group)[:max_per_task]]
    return _keep_chosen(records, chosen, "task limit")


def _keep_chosen(records: Sequence[EpisodeRecord], chosen: Sequence[EpisodeRecord], reason: str) -> FilterResult:
    ids = {record.trajectory.id for record in chosen}
    return split_episodes(records, lambda record: "" if record.trajectory.id in ids else reason)


def _interleave_patterns(records: Sequence[EpisodeRecord]) -> list[EpisodeRecord]:
    """Order records: the first of each pattern, then the second of each, and so on."""
    counts: defaultdict[ZoomPattern, int] = defaultdict(int)
    ranked = []
    for index, record in enumerate(records):
        pattern = classify_pattern(record.trajectory)
        ranked.append((counts[pattern], index, record))
        counts[pattern] += 1
    return [record for _, _, record in sorted(ranked, key=lambda item: item[:2])]


def max_per_kind(counts: Sequence[int], max_share: float) -> int:
    """Return the largest cap per kind with which no kind exceeds `max_share` of the kept episodes.

    If the number of kinds is too small (two kinds, a share of 0.4), the share becomes `1 / kinds`.

    Example:
        >>> max_per_kind([90, 10, 10], 0.5)
        20
    """
    if not counts:
        return 0
    max_share = max(max_share, 1 / len(counts))
    for cap in range(max(counts), 0, -1):
        if min(cap, max(counts)) <= max_share * sum(min(count, cap) for count in counts) + 1e-9:
            return cap
    return min(counts)


def balance(
    records: Sequence[EpisodeRecord],
    kind_of: Callable[[EpisodeRecord], Hashable],
    max_share: float,
    *,
    seed: int,
    reason: str,
) -> FilterResult:
    """Drop episodes of kinds above `max_share`. The random choice depends only on `seed` and the ids."""
    by_kind: defaultdict[Hashable, list[EpisodeRecord]] = defaultdict(list)
    for record in records:
        by_kind[kind_of(record)].append(record)
    cap = max_per_kind([len(group) for group in by_kind.values()], max_share)
    chosen = [
        record
        for group in by_kind.values()
        for record in sorted(group, key=lambda record: _sort_key(record, seed))[:cap]
    ]
    return _keep_chosen(records, chosen, reason)


def _sort_key(record: EpisodeRecord, seed: int) -> str:
    return blake3(f"{seed}/{record.trajectory.id}".encode()).hexdigest()
