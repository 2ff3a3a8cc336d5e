"""Data set directory, and the data card with inputs, dropped and kept episodes, and cost.

dataset/sft.json              SFT samples, see `vz_ray/data/sft_file.py`
dataset/images/ab/ab12...png  frames, without duplicates
dataset/episodes.jsonl        kept episodes with frame references
dataset/dropped.jsonl         dropped episodes and reasons
dataset/card.md, card.json    data card
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table

from vz_ray.data.episode_record import EpisodeRecord, record_to_dict
from vz_ray.data.sft_file import trajectory_to_sample
from vz_ray.distill.cost_ledger import CostSummary
from vz_ray.distill.filters import CurationResult, count_prefix_turns
from vz_ray.distill.zoom_patterns import classify_pattern
from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.protocols import FrameSource
from vz_ray.env.trajectory import EpisodeStatus
from vz_ray.utils.atomic_files import atomic_directory
from vz_ray.utils.json_lines import to_json_line
from vz_ray.video.frame import FrameRef
from vz_ray.video.image_encoding import encode_image

SFT_FILE, EPISODES_FILE, DROPPED_FILE = "sft.json", "episodes.jsonl", "dropped.jsonl"


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


async def write_dataset(
    directory: Path,
    curated: CurationResult,
    card: DataCard,
    chat_format: ChatFormat,
    frames: FrameSource,
    image_format: str,
) -> None:
    """Write `directory` atomically, replacing an existing one.

    Raises:
        VideoError: A frame cannot be decoded again.
    """

    def image_path(ref: FrameRef) -> str:
        name = f"{ref.digest[:24]}-{ref.width}x{ref.height}"
        return f"images/{name[:2]}/{name}.{'jpg' if image_format == 'jpeg' else image_format}"

    with atomic_directory(directory) as partial:
        samples = []
        for record in curated.kept:
            trajectory = record.trajectory
            prefix_turns = count_prefix_turns(record)
            samples.append(trajectory_to_sample(trajectory, chat_format, image_path, num_context_turns=prefix_turns))
            refs = {image_path(ref): ref for ref in trajectory.frame_refs}
            missing = {path: ref for path, ref in refs.items() if not (partial / path).exists()}
            resolved = await frames.resolve(list(missing.values()))
            for path, frame in zip(missing, resolved, strict=True):
                (partial / path).parent.mkdir(parents=True, exist_ok=True)
                (partial / path).write_bytes(encode_image(frame.rgb, image_format))
        (partial / SFT_FILE).write_text(json.dumps(samples, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        lines = (to_json_line(record_to_dict(record)) for record in curated.kept)
        (partial / EPISODES_FILE).write_text("".join(lines), encoding="utf-8")
        reasons = (to_json_line({"episode": drop.episode_id, "reason": drop.reason}) for drop in curated.dropped)
        (partial / DROPPED_FILE).write_text("".join(reasons), encoding="utf-8")
        (partial / "card.md").write_text(to_markdown(card), encoding="utf-8")
        (partial / "card.json").write_text(json.dumps(asdict(card), indent=1) + "\n", encoding="utf-8")
