"""An ablation as tables, for the terminal and as Markdown, beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from vz_ray.config.ablate import FULL, title_of
from vz_ray.evaluate.ablation import ACCURACY, MARKDOWN, Verdict
from vz_ray.observe.run_dir import write_atomic

Json = Mapping[str, Any]

LOG_WIDTH = 150
"""Columns where the output is a file and has no width of its own."""

BENCHMARKS = {
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
class Rows:
    """A table as text: the first column is a name, the others are figures."""

    title: str
    head: Sequence[str]
    body: Sequence[Sequence[str]]

    def rich(self) -> Table:
        table = Table(
            title=self.title, title_justify="left", pad_edge=False, box=SIMPLE, padding=(0, 1, 0, 0)
        )
        for number, name in enumerate(self.head):
            widest = max(map(len, name.split()), default=0)
            table.add_column(
                name, justify="right" if number else "left", no_wrap=not number, min_width=widest
            )
        for row in self.body:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)], *self.body]
        return f"### {self.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tables(found: Json) -> list[Rows]:
    """Ours, what it shows, and the paper's."""
    return [_variants(found), _claims(found), _paper(found)]


def _variants(found: Json) -> Rows:
    seeds = [str(seed) for seed in found["seeds"]]
    head = ["", "right %", "interval", f"seeds {', '.join(seeds)}", "frames", "zooms", "zooming %", "valid %"]
    body = []
    for name, one in found["variants"].items():
        runs = [one["seeds"].get(seed) for seed in seeds]
        zooms = one["zooms"]
        body.append(
            [
                title_of(name),
                _percent(one["accuracy"] and one["accuracy"]["mean"]),
                _between(one["accuracy"], 100, 1),
                " / ".join(_percent(run and run["accuracy"]) for run in runs),
                _number(one["frames_mean"]),
                _number(zooms and zooms["mean"], 2),
                _percent(one["zoom_call_rate"]),
                _percent(one["valid_zoom_rate"]),
            ]
        )
    return Rows(f"Needle world, {found['questions']} questions about {found['videos']} videos", head, body)


def _claims(found: Json) -> Rows:
    head = ["what the paper has", "difference", "interval", "by seed", "n", "here"]
    body = []
    for claim in found["claims"]:
        points = claim["figure"] == ACCURACY
        scale, digits = (100, 1) if points else (1, 2)
        seeds = " / ".join(f"{scale * value:+.{digits}f}" for value in claim["seeds"].values())
        body.append(
            [
                f"{claim['figure']}: {title_of(claim['more'])} > {title_of(claim['less'])}",
                f"{scale * claim['difference']['mean']:+.{digits}f}",
                _between(claim["difference"], scale, digits, sign="+"),
                seeds,
                str(claim["questions"]),
                claim["verdict"],
            ]
        )
    return Rows("Paired differences (accuracy in points)", head, body)


def _paper(found: Json) -> Rows:
    head = ["", *BENCHMARKS.values(), "zooms"]
    body = [
        [
            title_of(name),
            *(_number(one["paper"]["accuracy"].get(key)) for key in BENCHMARKS),
            _number(one["paper"]["zooms"], 0),
        ]
        for name, one in found["variants"].items()
    ]
    return Rows(f"The paper's own, 7B ({found['paper']})", head, body)


def remarks(found: Json) -> list[str]:
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
            f"{c['figure']} of {title_of(c['more'])} > {title_of(c['less'])}"
            for c in claims
            if c["verdict"] == verdict
        ]
        for verdict in (Verdict.REVERSED, Verdict.NOT_SHOWN)
    }
    parts = [f"{verdict}: {'; '.join(lines)}" for verdict, lines in groups.items() if lines]
    if not parts:
        return "the paper's order: what was run is shown, but not all of its variants were run"
    return f"the paper's order is not shown as a whole. {'. '.join(parts)}"


def markdown(found: Json) -> str:
    """Tables and remarks, to be pasted somewhere."""
    return "\n".join(
        [*(table.markdown() for table in tables(found)), *(f"- {line}" for line in remarks(found)), ""]
    )


def write_markdown(run: Path, found: Json) -> None:
    write_atomic(run / MARKDOWN, markdown(found).encode())


def print_ablation(found: Json, console: Console | None = None) -> None:
    """The tables of an ablation, and what they show."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, LOG_WIDTH)
    if FULL not in found["variants"]:
        console.print("no variant has been evaluated yet", highlight=False)
        return
    for table in tables(found):
        console.print(table.rich())
    for line in remarks(found):
        console.print(line, highlight=False, markup=False)


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return _number(None if value is None else 100 * value)


def _between(interval: Json | None, scale: float, digits: int, sign: str = "") -> str:
    if interval is None:
        return "-"
    return " to ".join(f"{scale * interval[end]:{sign}.{digits}f}" for end in ("low", "high"))
