"""An ablation as tables, for the terminal and as Markdown, beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from vz_ray.config.ablation import FULL, variant_title
from vz_ray.eval.ablation_results import ABLATION_MARKDOWN, ACCURACY, ClaimStatus
from vz_ray.utils.atomic_files import write_atomic

Json = Mapping[str, Any]

ABLATION_WIDTH = 150
"""Columns where the output is a file and has no width of its own."""

PAPER_COLUMNS = {
    "mlvu_dev/micro": "MLVU dev",
    "mlvu_test/micro": "MLVU test",
    "longvideobench/accuracy": "LongVideoBench",
    "videomme/overall": "VideoMME",
    "videomme/long": "VideoMME long",
    "lvbench/accuracy": "LVBench",
    "video_mmlu/accuracy": "Video-MMLU",
    "videommmu/overall": "VideoMMMU",
    "longvideoreason/accuracy": "LongVideoReason",
}
"""The paper's ablation table."""


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table as text: the first column is a name, the others are figures."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_rich(self) -> Table:
        table = Table(
            title=self.title, title_justify="left", pad_edge=False, box=SIMPLE, padding=(0, 1, 0, 0)
        )
        for number, name in enumerate(self.header):
            widest = max(map(len, name.split()), default=0)
            table.add_column(
                name, justify="right" if number else "left", no_wrap=not number, min_width=widest
            )
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return f"### {self.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def ablation_tables(found: Json) -> list[TextTable]:
    """Ours, what it shows, and the paper's."""
    return [_variants(found), _claims(found), _paper(found)]


def _variants(found: Json) -> TextTable:
    seeds = [str(seed) for seed in found["seeds"]]
    head = ["", "right %", "interval", f"seeds {', '.join(seeds)}", "frames", "zooms", "zooming %", "valid %"]
    body = []
    for name, one in found["variants"].items():
        runs = [one["seeds"].get(seed) for seed in seeds]
        zooms = one["zooms"]
        body.append(
            [
                variant_title(name),
                _percent(one["accuracy"] and one["accuracy"]["mean"]),
                _between(one["accuracy"], 100, 1),
                " / ".join(_percent(run and run["accuracy"]) for run in runs),
                _number(one["frames_mean"]),
                _number(zooms and zooms["mean"], 2),
                _percent(one["zoom_call_rate"]),
                _percent(one["valid_zoom_rate"]),
            ]
        )
    return TextTable(
        f"Needle world, {found['questions']} questions about {found['videos']} videos", head, body
    )


def _claims(found: Json) -> TextTable:
    head = ["what the paper has", "difference", "interval", "by seed", "n", "here"]
    body = []
    for claim in found["claims"]:
        points = claim["metric"] == ACCURACY
        scale, digits = (100, 1) if points else (1, 2)
        seeds = " / ".join(f"{scale * value:+.{digits}f}" for value in claim["seeds"].values())
        body.append(
            [
                f"{claim['figure']}: {variant_title(claim['more'])} > {variant_title(claim['less'])}",
                f"{scale * claim['difference']['mean']:+.{digits}f}",
                _between(claim["difference"], scale, digits, sign="+"),
                seeds,
                str(claim["questions"]),
                claim["verdict"],
            ]
        )
    return TextTable("Paired differences (accuracy in points)", head, body)


def _paper(found: Json) -> TextTable:
    head = ["", *PAPER_COLUMNS.values(), "zooms"]
    body = [
        [
            variant_title(name),
            *(_number(one["paper"]["accuracy"].get(key)) for key in PAPER_COLUMNS),
            _number(one["paper"]["zooms"], 0),
        ]
        for name, one in found["variants"].items()
    ]
    return TextTable(f"The paper's own, 7B ({found['paper']})", head, body)


def ablation_notes(found: Json) -> list[str]:
    """What the figures say of the paper's order, and what must be known to read them."""
    level = f"{100 * found['interval_level']:g}%"
    drawn = "seeds and whole videos are drawn" if len(found["seeds"]) > 1 else "whole videos are drawn"
    said = [_order(found), f"intervals: {level}, {drawn}; a difference whose interval holds 0 is not shown"]
    if len(found["seeds"]) == 1:
        said.append("one seed: nothing is said about how another training would have come out")
    if left := sum(one["invalid"] for one in found["variants"].values()):
        said.append(f"{left} answers could not be judged and are in no figure")
    for seed, counts in found.get("reflections", {}).items():
        came = ", ".join(f"{count} {name}" for name, count in counts.items())
        said.append(f"reflections of seed {seed}: {came}")
    return said


def _order(found: Json) -> str:
    claims = found["claims"]
    if found["order_holds"]:
        return "the paper's order holds: every difference is shown"
    groups = {
        verdict: [
            f"{c['figure']} of {variant_title(c['more'])} > {variant_title(c['less'])}"
            for c in claims
            if c["verdict"] == verdict
        ]
        for verdict in (ClaimStatus.REVERSED, ClaimStatus.NOT_SHOWN)
    }
    parts = [f"{verdict}: {'; '.join(lines)}" for verdict, lines in groups.items() if lines]
    if not parts:
        return "the paper's order: what was run is shown, but not all of its variants were run"
    return f"the paper's order is not shown as a whole. {'. '.join(parts)}"


def ablation_markdown(found: Json) -> str:
    """Tables and remarks, to be pasted somewhere."""
    return "\n".join(
        [
            *(table.to_markdown() for table in ablation_tables(found)),
            *(f"- {line}" for line in ablation_notes(found)),
            "",
        ]
    )


def write_markdown(run: Path, found: Json) -> None:
    write_atomic(run / ABLATION_MARKDOWN, ablation_markdown(found).encode())


def print_ablation(found: Json, console: Console | None = None) -> None:
    """The tables of an ablation, and what they show."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, ABLATION_WIDTH)
    if FULL not in found["variants"]:
        console.print("no variant has been evaluated yet", highlight=False)
        return
    for table in ablation_tables(found):
        console.print(table.to_rich())
    for line in ablation_notes(found):
        console.print(line, highlight=False, markup=False)


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return _number(None if value is None else 100 * value)


def _between(interval: Json | None, scale: float, digits: int, sign: str = "") -> str:
    if interval is None:
        return "-"
    return " to ".join(f"{scale * interval[end]:{sign}.{digits}f}" for end in ("low", "high"))
