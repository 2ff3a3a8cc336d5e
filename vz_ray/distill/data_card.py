"""What came in, what was dropped and why, what is kept, and what it cost: for people and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from vz_ray.data.episode_record import EpisodeRecord
from vz_ray.distill.cost_ledger import CostSummary
from vz_ray.distill.filters import DroppedEpisode, count_prefix_turns
from vz_ray.distill.zoom_patterns import classify_pattern
from vz_ray.env.trajectory import EpisodeStatus


@dataclass(frozen=True, slots=True)
class DataCard:
    """A data card; `num_episodes` is the sum of `dropped` and `kept`.

    Attributes:
        title: What it is a card of.
        teacher: Model that played.
        planned: Episodes that were to be played.
        num_episodes: Episodes in the log, failed ones included.
        inputs: Further counts of what came in, by name.
        outcomes: Played episodes by how they ended.
        dropped: By reason.
        kept: Episodes in the data set.
        sources: Kept, by data set of the question.
        patterns: Kept, by pattern.
        turns: Kept, by number of turns.
        prefix_turns: Kept turns that are read and not learned from.
        pass_rates: Tasks by the share of their attempts that were right, in fifths.
        cost: What was spent on all of it.
        held_out: Evaluation sets that it was compared with.
    """

    title: str
    teacher: str
    planned: int
    num_episodes: int
    inputs: dict[str, int]
    outcomes: dict[str, int]
    dropped: dict[str, int]
    kept: int
    sources: dict[str, int]
    patterns: dict[str, int]
    turns: dict[str, int]
    prefix_turns: int
    pass_rates: dict[str, int]
    cost: CostSummary
    held_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.num_episodes != self.kept + sum(self.dropped.values()):
            dropped = sum(self.dropped.values())
            raise ValueError(
                f"{self.num_episodes} episodes were played, {self.kept} kept and {dropped} dropped"
            )

    @property
    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def sections(self) -> dict[str, Mapping[str, object]]:
        """Its tables, by title; those with nothing in them are left out."""
        cost = self.cost
        sections: dict[str, Mapping[str, object]] = {
            "Came in": {**self.inputs, "planned": self.planned, "num_episodes": self.num_episodes},
            "Ended": self.outcomes,
            "Tasks by share right": self.pass_rates,
            "Dropped": self.dropped,
            "Kept": {"episodes": self.kept, "turns read, not learned from": self.prefix_turns},
            "Kept, by source": self.sources,
            "Kept, by pattern": self.patterns,
            "Kept, by turns": self.turns,
            "Cost": {
                "requests": cost.requests,
                "refused, not charged": cost.rejected,
                "tokens in": cost.prompt_tokens,
                "tokens out": cost.completion_tokens,
                "usd": f"{cost.cost_usd:.4f}",
                "usd at most, of requests without a reply": f"{cost.reserved_usd:.4f}",
            },
        }
        return {title: rows for title, rows in sections.items() if rows}


def build_data_card(
    title: str,
    teacher: str,
    records: Sequence[EpisodeRecord],
    kept: Sequence[EpisodeRecord],
    dropped: Sequence[DroppedEpisode],
    cost: CostSummary,
    *,
    planned: int,
    pass_rates: Mapping[str, float],
    inputs: Mapping[str, int],
    held_out: Sequence[str],
) -> DataCard:
    """Counts everything; raises `ValueError` if an episode is neither kept nor dropped."""
    return DataCard(
        title=title,
        teacher=teacher,
        planned=planned,
        num_episodes=len(records),
        inputs=dict(inputs),
        outcomes=_counts(_ending(record) for record in records),
        dropped=_counts(one.reason for one in dropped),
        kept=len(kept),
        sources=_counts(record.task.source or "unnamed" for record in kept),
        patterns=_counts(str(classify_pattern(record.trajectory)) for record in kept),
        turns=_counts(str(len(record.trajectory.turns)) for record in kept),
        prefix_turns=sum(count_prefix_turns(record) for record in kept),
        pass_rates=_fifths(pass_rates),
        cost=cost,
        held_out=list(held_out),
    )


def _ending(record: EpisodeRecord) -> str:
    trajectory = record.trajectory
    if trajectory.status is not EpisodeStatus.ANSWERED:
        return str(trajectory.status)
    reward = trajectory.reward
    right = reward is not None and reward.valid and reward.accuracy == 1
    return "answered, right" if right else "answered, not right"


def _counts(names: Any) -> dict[str, int]:
    """By name, the most frequent first."""
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _fifths(rates: Mapping[str, float]) -> dict[str, int]:
    def span(rate: float) -> str:
        if rate in (0.0, 1.0):
            return "none" if rate == 0 else "all"
        low = min(4, int(rate * 5)) * 20
        return f"{low}-{low + 20}%"

    order = ("none", *(f"{low}-{low + 20}%" for low in range(0, 100, 20)), "all")
    counts = Counter(span(rate) for rate in rates.values())
    return {name: counts[name] for name in order if counts[name]}


def to_markdown(card: DataCard) -> str:
    """The card as a page."""
    lines = [f"# {card.title}", "", f"Played by `{card.teacher}`."]
    if card.held_out:
        lines.append(f"Kept apart from {', '.join(f'`{path}`' for path in card.held_out)}.")
    for title, rows in card.sections.items():
        lines += ["", f"## {title}", "", "| | |", "|---|---:|"]
        lines += [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(lines) + "\n"


def to_table(card: DataCard) -> Table:
    """The card for the terminal."""
    found = Table(title=f"{card.title}, by {card.teacher}", box=SIMPLE, pad_edge=False)
    for name, justify in (("", "left"), (" ", "left"), ("  ", "right")):
        found.add_column(name, justify=justify)  # type: ignore[arg-type]
    for title, rows in card.sections.items():
        for number, (name, value) in enumerate(rows.items()):
            found.add_row(title if not number else "", name, str(value), end_section=number == len(rows) - 1)
    return found
