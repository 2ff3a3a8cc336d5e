"""What came in, what was dropped and why, what is kept, and what it cost: for people and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from vz_ray.coldstart.distill.account import Spent
from vz_ray.coldstart.distill.patterns import pattern_of
from vz_ray.coldstart.distill.select import Dropped, given_turns
from vz_ray.data.record import EpisodeRecord
from vz_ray.episode.trajectory import Status


@dataclass(frozen=True, slots=True)
class Card:
    """A data card; `played` is the sum of `dropped` and `kept`.

    Attributes:
        title: What it is a card of.
        expert: Model that played.
        planned: Episodes that were to be played.
        played: Episodes in the log, failed ones included.
        came_in: Further counts of what came in, by name.
        ended: Played episodes by how they ended.
        dropped: By reason.
        kept: Episodes in the data set.
        sources: Kept, by data set of the question.
        patterns: Kept, by pattern.
        turns: Kept, by number of turns.
        given: Kept turns that are read and not learned from.
        pass_rates: Tasks by the share of their attempts that were right, in fifths.
        cost: What was spent on all of it.
        against: Evaluation sets that it was compared with.
    """

    title: str
    expert: str
    planned: int
    played: int
    came_in: dict[str, int]
    ended: dict[str, int]
    dropped: dict[str, int]
    kept: int
    sources: dict[str, int]
    patterns: dict[str, int]
    turns: dict[str, int]
    given: int
    pass_rates: dict[str, int]
    cost: Spent
    against: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.played != self.kept + sum(self.dropped.values()):
            dropped = sum(self.dropped.values())
            raise ValueError(f"{self.played} episodes were played, {self.kept} kept and {dropped} dropped")

    @property
    def json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def sections(self) -> dict[str, Mapping[str, object]]:
        """Its tables, by title; those with nothing in them are left out."""
        cost = self.cost
        sections: dict[str, Mapping[str, object]] = {
            "Came in": {**self.came_in, "planned": self.planned, "played": self.played},
            "Ended": self.ended,
            "Tasks by share right": self.pass_rates,
            "Dropped": self.dropped,
            "Kept": {"episodes": self.kept, "turns read, not learned from": self.given},
            "Kept, by source": self.sources,
            "Kept, by pattern": self.patterns,
            "Kept, by turns": self.turns,
            "Cost": {
                "requests": cost.requests,
                "refused, not charged": cost.refused,
                "tokens in": cost.prompt_tokens,
                "tokens out": cost.completion_tokens,
                "usd": f"{cost.usd:.4f}",
                "usd at most, of requests without a reply": f"{cost.unsure_usd:.4f}",
            },
        }
        return {title: rows for title, rows in sections.items() if rows}


def make_card(
    title: str,
    expert: str,
    records: Sequence[EpisodeRecord],
    kept: Sequence[EpisodeRecord],
    dropped: Sequence[Dropped],
    cost: Spent,
    *,
    planned: int,
    rates: Mapping[str, float],
    came_in: Mapping[str, int],
    against: Sequence[str],
) -> Card:
    """Counts everything; raises `ValueError` if an episode is neither kept nor dropped."""
    return Card(
        title=title,
        expert=expert,
        planned=planned,
        played=len(records),
        came_in=dict(came_in),
        ended=_counts(_ending(record) for record in records),
        dropped=_counts(one.reason for one in dropped),
        kept=len(kept),
        sources=_counts(record.task.source or "unnamed" for record in kept),
        patterns=_counts(str(pattern_of(record.trajectory)) for record in kept),
        turns=_counts(str(len(record.trajectory.turns)) for record in kept),
        given=sum(given_turns(record) for record in kept),
        pass_rates=_fifths(rates),
        cost=cost,
        against=list(against),
    )


def _ending(record: EpisodeRecord) -> str:
    trajectory = record.trajectory
    if trajectory.status is not Status.ANSWERED:
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


def markdown(card: Card) -> str:
    """The card as a page."""
    lines = [f"# {card.title}", "", f"Played by `{card.expert}`."]
    if card.against:
        lines.append(f"Kept apart from {', '.join(f'`{path}`' for path in card.against)}.")
    for title, rows in card.sections.items():
        lines += ["", f"## {title}", "", "| | |", "|---|---:|"]
        lines += [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(lines) + "\n"


def table(card: Card) -> Table:
    """The card for the terminal."""
    found = Table(title=f"{card.title}, by {card.expert}", box=SIMPLE, pad_edge=False)
    for name, justify in (("", "left"), (" ", "left"), ("  ", "right")):
        found.add_column(name, justify=justify)  # type: ignore[arg-type]
    for title, rows in card.sections.items():
        for number, (name, value) in enumerate(rows.items()):
            found.add_row(title if not number else "", name, str(value), end_section=number == len(rows) - 1)
    return found
