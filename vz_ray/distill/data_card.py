"""Data card: inputs, dropped and kept episodes, and cost, as Markdown, terminal table and JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from vz_ray.data.episode_record import EpisodeRecord
from vz_ray.distill.cost_ledger import CostSummary
from vz_ray.distill.curation import CurationResult
from vz_ray.distill.filters import count_prefix_turns
from vz_ray.distill.zoom_patterns import classify_pattern
from vz_ray.env.trajectory import EpisodeStatus


@dataclass(frozen=True, slots=True)
class DataCard:
    """Data card. `num_episodes` must equal the sum of `dropped` and `kept`.

    Attributes:
        title: Name of the run and stage.
        teacher: Name of the teacher model.
        planned: Planned episodes.
        num_episodes: Episodes in the log, including failed ones.
        inputs: Additional counts of the inputs, by name.
        outcomes: Episodes by outcome.
        dropped: Dropped episodes by reason.
        kept: Episodes in the data set.
        sources: Kept episodes by source of the question.
        patterns: Kept episodes by zoom pattern.
        turns: Kept episodes by number of turns.
        prefix_turns: Turns of the policy in kept episodes, which have no loss.
        pass_rates: Tasks by share of correct attempts, in fifths.
        cost: Cost of all episodes.
        held_out: Task files of the held-out evaluation sets.

    Raises:
        ValueError: An episode is neither kept nor dropped.
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
                f"num_episodes is {self.num_episodes}; it must be kept ({self.kept}) plus dropped ({dropped})"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def sections(self) -> dict[str, Mapping[str, object]]:
        """Non-empty tables by title."""
        cost = self.cost
        sections: dict[str, Mapping[str, object]] = {
            "Input": {**self.inputs, "planned": self.planned, "episodes": self.num_episodes},
            "Outcomes": self.outcomes,
            "Tasks by pass rate": self.pass_rates,
            "Dropped": self.dropped,
            "Kept": {"episodes": self.kept, "prefix turns without loss": self.prefix_turns},
            "Kept, by source": self.sources,
            "Kept, by pattern": self.patterns,
            "Kept, by turns": self.turns,
            "Cost": {
                "requests": cost.requests,
                "rejected, not charged": cost.rejected,
                "prompt tokens": cost.prompt_tokens,
                "completion tokens": cost.completion_tokens,
                "usd": f"{cost.cost_usd:.4f}",
                "usd reserved for requests without a reply": f"{cost.reserved_usd:.4f}",
            },
        }
        return {title: rows for title, rows in sections.items() if rows}


def build_data_card(
    title: str,
    teacher: str,
    records: Sequence[EpisodeRecord],
    curated: CurationResult,
    cost: CostSummary,
    *,
    planned: int,
    inputs: Mapping[str, int],
    held_out: Sequence[str],
) -> DataCard:
    """Count the episodes of a run. Raise `ValueError` if an episode is neither kept nor dropped."""
    return DataCard(
        title=title,
        teacher=teacher,
        planned=planned,
        num_episodes=len(records),
        inputs=dict(inputs),
        outcomes=_count(_outcome(record) for record in records),
        dropped=_count(episode.reason for episode in curated.dropped),
        kept=len(curated.kept),
        sources=_count(record.task.source or "unnamed" for record in curated.kept),
        patterns=_count(str(classify_pattern(record.trajectory)) for record in curated.kept),
        turns=_count(str(len(record.trajectory.turns)) for record in curated.kept),
        prefix_turns=sum(count_prefix_turns(record) for record in curated.kept),
        pass_rates=_count_by_fifth(curated.pass_rates),
        cost=cost,
        held_out=list(held_out),
    )


def _outcome(record: EpisodeRecord) -> str:
    trajectory = record.trajectory
    if trajectory.status is not EpisodeStatus.ANSWERED:
        return str(trajectory.status)
    reward = trajectory.reward
    correct = reward is not None and reward.valid and reward.accuracy == 1
    return "answered, correct" if correct else "answered, not correct"


def _count(names: Iterable[str]) -> dict[str, int]:
    """Count names, most frequent first."""
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _count_by_fifth(rates: Mapping[str, float]) -> dict[str, int]:
    def bucket(rate: float) -> str:
        if rate in (0.0, 1.0):
            return "none" if rate == 0 else "all"
        low = min(4, int(rate * 5)) * 20
        return f"{low}-{low + 20}%"

    order = ("none", *(f"{low}-{low + 20}%" for low in range(0, 100, 20)), "all")
    counts = Counter(bucket(rate) for rate in rates.values())
    return {name: counts[name] for name in order if counts[name]}


def to_markdown(card: DataCard) -> str:
    """Render the card as Markdown."""
    lines = [f"# {card.title}", "", f"Teacher: `{card.teacher}`."]
    if card.held_out:
        lines.append(f"Decontaminated against {', '.join(f'`{path}`' for path in card.held_out)}.")
    for title, rows in card.sections.items():
        lines += ["", f"## {title}", "", "| | |", "|---|---:|"]
        lines += [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(lines) + "\n"


def to_table(card: DataCard) -> Table:
    """Render the card for the terminal."""
    table = Table(title=f"{card.title}, teacher {card.teacher}", box=SIMPLE, pad_edge=False)
    for name, justify in (("", "left"), (" ", "left"), ("  ", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for title, rows in card.sections.items():
        for number, (name, value) in enumerate(rows.items()):
            table.add_row(title if not number else "", name, str(value), end_section=number == len(rows) - 1)
    return table
