"""Tables of an ablation for the terminal and as Markdown, with the paper's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vz_ray.config.ablation import FULL, variant_title
from vz_ray.eval.ablation_results import ABLATION_MARKDOWN, ACCURACY, ClaimStatus
from vz_ray.eval.tables import number_cell, percent_cell, results_table
from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.console import make_console

Json = Mapping[str, Any]

ABLATION_WIDTH = 150
"""Minimum width in columns if the output is not a terminal."""

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
"""Columns of the paper's ablation table."""


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table of strings: the first column holds names, the others numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_rich(self) -> Table:
        first, *headings = self.header
        table = results_table(self.title, *headings, first=first)
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return f"### {self.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def ablation_tables(ablation: Json) -> list[TextTable]:
    """Return the tables of variants, of claims, and of the paper's results."""
    return [_variants(ablation), _claims(ablation), _paper(ablation)]


def _variants(ablation: Json) -> TextTable:
    seeds = [str(seed) for seed in ablation["seeds"]]
    seed_column = f"seeds {', '.join(seeds)}"
    header = ["", "accuracy %", "interval", seed_column, "frames", "zooms", "zooming %", "valid %"]
    rows = []
    for name, variant in ablation["variants"].items():
        runs = [variant["seeds"].get(seed) for seed in seeds]
        zooms = variant["zooms"]
        rows.append(
            [
                variant_title(name),
                percent_cell(variant["accuracy"] and variant["accuracy"]["mean"]),
                _format_interval(variant["accuracy"], 100, 1),
                " / ".join(percent_cell(run and run["accuracy"]) for run in runs),
                number_cell(variant["frames_mean"]),
                number_cell(zooms and zooms["mean"], 2),
                percent_cell(variant["zoom_call_rate"]),
                percent_cell(variant["valid_zoom_rate"]),
            ]
        )
    title = f"Needle world, {ablation['questions']} questions about {ablation['videos']} videos"
    return TextTable(title, header, rows)


def _claims(ablation: Json) -> TextTable:
    header = ["claim of the paper", "difference", "interval", "by seed", "n", "status"]
    rows = []
    for claim in ablation["claims"]:
        scale, digits = (100, 1) if claim["metric"] == ACCURACY else (1, 2)
        seeds = " / ".join(f"{scale * value:+.{digits}f}" for value in claim["seeds"].values())
        rows.append(
            [
                f"{claim['metric']}: {variant_title(claim['greater'])} > {variant_title(claim['lesser'])}",
                f"{scale * claim['difference']['mean']:+.{digits}f}",
                _format_interval(claim["difference"], scale, digits, sign="+"),
                seeds,
                str(claim["questions"]),
                claim["status"],
            ]
        )
    return TextTable("Paired differences (accuracy in points)", header, rows)


def _paper(ablation: Json) -> TextTable:
    header = ["", *PAPER_COLUMNS.values(), "zooms"]
    rows = [
        [
            variant_title(name),
            *(number_cell(variant["paper"]["accuracy"].get(key)) for key in PAPER_COLUMNS),
            number_cell(variant["paper"]["zooms"], 0),
        ]
        for name, variant in ablation["variants"].items()
    ]
    return TextTable(f"The paper's results, 7B ({ablation['paper']})", header, rows)


def ablation_notes(ablation: Json) -> list[str]:
    """Return notes: whether the paper's order holds, how intervals are computed, what is excluded."""
    level = f"{100 * ablation['interval_level']:g}%"
    units = "seeds and whole videos" if len(ablation["seeds"]) > 1 else "whole videos"
    notes = [
        _order(ablation),
        f"{level} intervals resample {units}; a difference whose interval contains 0 is inconclusive",
    ]
    if len(ablation["seeds"]) == 1:
        notes.append("one seed: intervals do not include the variance between trainings")
    if invalid := sum(variant["invalid"] for variant in ablation["variants"].values()):
        notes.append(f"{invalid} answers could not be judged and are excluded from all metrics")
    for seed, counts in ablation.get("reflections", {}).items():
        items = ", ".join(f"{count} {name}" for name, count in counts.items())
        notes.append(f"reflections of seed {seed}: {items}")
    return notes


def _order(ablation: Json) -> str:
    if ablation["order_holds"]:
        return "the paper's order holds: every claim is supported"
    claims_by_status = {
        status: [
            f"{claim['metric']} of {variant_title(claim['greater'])} > {variant_title(claim['lesser'])}"
            for claim in ablation["claims"]
            if claim["status"] == status
        ]
        for status in (ClaimStatus.REVERSED, ClaimStatus.INCONCLUSIVE)
    }
    parts = [f"{status}: {'; '.join(claims)}" for status, claims in claims_by_status.items() if claims]
    if not parts:
        return "the paper's order: all evaluated claims are supported, but some variants have no results"
    return f"the paper's order is not fully supported. {'. '.join(parts)}"


def ablation_markdown(ablation: Json) -> str:
    """Return tables and notes as Markdown."""
    tables = [table.to_markdown() for table in ablation_tables(ablation)]
    return "\n".join([*tables, *(f"- {note}" for note in ablation_notes(ablation)), ""])


def write_markdown(run_dir: Path, ablation: Json) -> None:
    """Write `ablation.md` atomically."""
    write_atomic(run_dir / ABLATION_MARKDOWN, ablation_markdown(ablation).encode())


def print_ablation(ablation: Json, console: Console | None = None) -> None:
    """Print the tables and notes of an ablation."""
    console = make_console(ABLATION_WIDTH, console)
    if FULL not in ablation["variants"]:
        console.print(f"variant {FULL} has no results yet", highlight=False)
        return
    for table in ablation_tables(ablation):
        console.print(table.to_rich())
    for note in ablation_notes(ablation):
        console.print(note, highlight=False, markup=False)


def _format_interval(interval: Json | None, scale: float, digits: int, sign: str = "") -> str:
    if interval is None:
        return "-"
    return " to ".join(f"{scale * interval[end]:{sign}.{digits}f}" for end in ("low", "high"))
