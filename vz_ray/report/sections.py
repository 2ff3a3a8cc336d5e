"""Sections of the run report: tiles, charts and tables."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vz_ray.monitoring import metric_names as keys
from vz_ray.report.markup import bar, escape, figure, format_number, format_percent, legend, stage_title, table
from vz_ray.report.svg_chart import ChartSeries, line_chart
from vz_ray.utils.durations import format_duration

Json = Mapping[str, Any]
Rows = Sequence[Mapping[str, float]]
_AGENT_STAGES = ("cold_start", "sft_continued", "rl")
_COLORS = {"cold_start": 3, "sft_continued": 4, "rl": 1}
"""Chart color of each stage; uniform frames have color 2."""
_UNIFORM = re.compile(r"uniform_(\d+)")


def _tile(title: str, value: str, note: str = "") -> str:
    return f'<div class="tile"><h3>{escape(title)}</h3><b>{escape(value)}</b><p>{escape(note)}</p></div>'


def _points(gain: Json | None, against: str) -> str:
    """`+12.3 points over the cold start (8.1 to 16.0)`."""
    if gain is None:
        return ""
    low, high = 100 * gain["low"], 100 * gain["high"]
    return f"{100 * gain['mean']:+.1f} points over {against} ({low:+.1f} to {high:+.1f})"


def summary_tiles(summary: Json) -> str:
    """Render the key results of a run as tiles."""
    tiles, gains = [], summary.get("gain", {})
    evaluations = summary.get("evaluations", {})
    final = next((stage for stage in reversed(_AGENT_STAGES) if stage in evaluations), None)
    if final:
        row = evaluations[final]
        accuracy = row["accuracy"]["mean"] if row["accuracy"] else None
        gain = _points(gains.get("over_cold_start"), "the cold start")
        tiles.append(_tile("Accuracy", format_percent(accuracy), gain))
        if frames := summary.get("uniform_baseline_frames"):
            uniform = summary["accuracy"].get("uniform", {}).get(str(frames))
            gain = _points(gains.get("over_uniform"), "uniform frames")
            note = f"The agent: {gain}" if gain else ""
            tiles.append(_tile(f"Uniform, {frames} frames", format_percent(uniform), note))
        note = f"95th percentile {format_number(row['frames_p95'])}"
        tiles.append(_tile("Frames seen", format_number(row["frames_mean"]), note))
        note = f"{format_percent(row['valid_zoom_rate'])} valid"
        tiles.append(_tile("Zooms per question", format_number(row["zooms_mean"], 2), note))
        if row["event_coverage"] is not None:
            tiles.append(_tile("Event in a zoom", format_percent(row["event_coverage"]), "of questions"))
    if (worst := summary.get("mismatch", {}).get("logprob_abs_max")) is not None:
        tiles.append(_tile("Engine mismatch", f"{worst:.1e}", "maximum log-prob difference, nats"))
    if total := summary.get("wall_s", {}).get("total"):
        tiles.append(_tile("Wall time", format_duration(total), "all stages"))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _stages(evaluations: Json) -> list[str]:
    """Return agent stages in run order, then uniform stages by frames, then other stages."""
    uniform = sorted((s for s in evaluations if _UNIFORM.fullmatch(s)), key=lambda s: int(s.removeprefix("uniform_")))
    first = [stage for stage in _AGENT_STAGES if stage in evaluations]
    return first + uniform + sorted(set(evaluations) - {*first, *uniform})


def accuracy_bars(summary: Json) -> str:
    """Render the accuracy of each evaluation with its interval."""
    bars = ""
    for stage in _stages(summary.get("evaluations", {})):
        accuracy = summary["evaluations"][stage]["accuracy"]
        if accuracy is None:
            continue
        low, high, mean = (100 * accuracy[name] for name in ("low", "high", "mean"))
        color = 2 if _UNIFORM.fullmatch(stage) else 1
        tooltip = f"{low:.1f} to {high:.1f}%, {accuracy['count']} questions"
        bars += bar(stage_title(stage), f"{mean:.1f}%", mean, color=color, interval=(low, high), tooltip=tooltip)
    if not bars:
        return ""
    intervals = f"Lines are {100 * summary['interval_level']:g}% intervals, resampled over whole videos."
    return figure("Accuracy on held-out questions", bars, footnote=intervals)


def frames_curve(summary: Json) -> str:
    """Chart of accuracy over frames: the uniform curve and the points of the agent."""
    evaluations = summary.get("evaluations", {})
    curve, bounds, agents = [], [], []
    for stage in _stages(evaluations):
        row, match = evaluations[stage], _UNIFORM.fullmatch(stage)
        if row["accuracy"] is None or not row["frames_mean"]:
            continue
        point = (float(match[1]) if match else row["frames_mean"], row["accuracy"]["mean"])
        interval = (row["accuracy"]["low"], row["accuracy"]["high"])
        if match:
            curve.append(point)
            bounds.append(interval)
        elif stage in _AGENT_STAGES:
            agents.append((stage, point, interval))
    series = [ChartSeries("Uniform frames", curve, color=2, markers=True, whiskers=bounds)]
    for stage, point, interval in agents:
        name = f"Agent {stage_title(stage)[0].lower()}{stage_title(stage)[1:]}"
        series.append(ChartSeries(name, [point], color=_COLORS[stage], markers=True, whiskers=[interval]))
    return line_chart(
        "Accuracy against frames seen",
        series,
        x_label="frames (logarithmic)",
        as_percent=True,
        x_log=True,
        x_ticks=[x for x, _ in curve],
    )


def failure_bars(summary: Json) -> str:
    """Chart of the failure modes of the agent, in percent of its episodes."""
    evaluations, failures = summary.get("evaluations", {}), summary.get("failures", {})
    stages = [s for s in _stages(evaluations) if s in failures and not _UNIFORM.fullmatch(s)][-5:]
    num_episodes = {s: evaluations[s]["questions"] + evaluations[s]["invalid"] for s in stages}
    shares = {s: {name: count / num_episodes[s] for name, count in failures[s].items()} for s in stages}
    largest = max((share for by_mode in shares.values() for share in by_mode.values()), default=0.0)
    if not largest:
        return ""
    colors = {stage: _COLORS.get(stage, (5, 2)[k % 2]) for k, stage in enumerate(stages)}
    bars = ""
    for name in shares[stages[0]]:
        if not any(shares[stage].get(name) for stage in stages):
            continue
        for stage, color in colors.items():
            share = shares[stage].get(name, 0.0)
            label = name.replace("_", " ") if stage == stages[0] else ""
            tooltip = f"{stage_title(stage)}: {failures[stage].get(name, 0)} of {num_episodes[stage]} episodes"
            bars += bar(label, f"{100 * share:.1f}%", 100 * share / largest, color=color, tooltip=tooltip)
    names = legend((f"s{color}", stage_title(stage)) for stage, color in colors.items())
    return figure("Failure modes, % of all episodes", names + bars, wide=True)


def question_kind_table(summary: Json) -> str:
    """Table of accuracy by question kind, one column per evaluation."""
    evaluations = summary.get("evaluations", {})
    stages = [stage for stage in _stages(evaluations) if evaluations[stage]["accuracy_by_kind"]]
    kinds = sorted({kind for stage in stages for kind in evaluations[stage]["accuracy_by_kind"]})
    if not kinds:
        return ""
    rows = []
    for kind in kinds:
        cells = (evaluations[stage]["accuracy_by_kind"].get(kind) for stage in stages)
        rows.append((kind, [format_percent(cell and cell["mean"]) for cell in cells]))
    return table("Accuracy by kind of question", ("", *map(stage_title, stages)), rows)


def evaluations_table(summary: Json) -> str:
    """Table of all metrics of all evaluations."""
    evaluations = summary.get("evaluations", {})
    if not evaluations:
        return ""
    columns: dict[str, Callable[[Json], str]] = {
        "Accuracy": lambda r: format_percent(r["accuracy"] and r["accuracy"]["mean"]),
        "Accuracy, event in frames": lambda r: format_percent(r["reading_accuracy"]),
        "Event in frames": lambda r: format_percent(r["event_visible_rate"]),
        "Event in a zoom": lambda r: format_percent(r["event_coverage"]),
        "Frames": lambda r: format_number(r["frames_mean"]),
        "Zooms": lambda r: format_number(r["zooms_mean"], 2),
        "Valid zooms": lambda r: format_percent(r["valid_zoom_rate"]),
        "Unparsed": lambda r: str(r["unparsed"]),
        "Invalid": lambda r: str(r["invalid"]),
        "Seconds": lambda r: format_number(r["seconds_mean"], 2),
        "Questions": lambda r: str(r["questions"]),
    }
    rows = [
        (stage_title(stage), [cell(evaluations[stage]) for cell in columns.values()]) for stage in _stages(evaluations)
    ]
    return table("All metrics", ("", *columns), rows)


@dataclass(frozen=True, slots=True)
class TrainingChart:
    """Chart of training metrics.

    Attributes:
        title: Title with unit.
        lines: Legend text of each key of `metrics.jsonl`.
        as_percent: Values are fractions.
        log: Logarithmic y axis.
        scale: Factor of the values.
    """

    title: str
    lines: Mapping[str, str]
    as_percent: bool = False
    log: bool = False
    scale: float = 1.0


_REWARD_PARTS = {
    keys.REWARD_TOTAL: "Total",
    keys.REWARD_ACCURACY: "Accuracy",
    keys.REWARD_FORMAT: "Format",
    keys.REWARD_TOOL: "Tool",
}
"""Parts that exist in every run."""
_ZOOM_RATES = {keys.ZOOM_CALL_RATE: "Episodes that zoom", keys.ZOOM_VALID_RATE: "Valid calls"}
_MISMATCH = {keys.MISMATCH_LOGPROB_MAX: "Maximum log-prob difference", keys.MISMATCH_KL: "KL"}
_CACHE_HIT_RATES = {keys.PREFIX_CACHE_HIT_RATE: "Prompt tokens", keys.FRAME_CACHE_HIT_RATE: "Frames"}
_MEMORY = {keys.DRIVER_MEMORY: "Driver", keys.WORKER_MEMORY: "Worker", keys.ENGINE_MEMORY: "Engine"}

_REWARD_CHART = TrainingChart("Reward and its parts, unweighted", _REWARD_PARTS)
_TRAINING_CHARTS = (
    TrainingChart("Zooming", _ZOOM_RATES, as_percent=True),
    TrainingChart("Episodes with the event in a zoom", {keys.EVENT_COVERAGE: "Coverage"}, as_percent=True),
    TrainingChart("Zooms per episode", {keys.ZOOMS_PER_EPISODE: "Zooms"}),
    TrainingChart("Frames per episode", {keys.FRAMES_PER_EPISODE: "Frames"}),
    TrainingChart("Entropy, nats per token", {keys.ENTROPY: "Entropy"}),
    TrainingChart("KL to the reference model, nats", {keys.KL_TO_REFERENCE: "KL"}),
    TrainingChart("Gradient norm", {keys.GRAD_NORM: "Norm"}),
    TrainingChart("Engine against learner, nats", _MISMATCH, log=True),
    TrainingChart("Weight sync, seconds from pause to resume", {keys.WEIGHT_SYNC_SECONDS: "Sync"}),
    TrainingChart("Engine cache hit rates", _CACHE_HIT_RATES, as_percent=True),
    TrainingChart("Rollout workers", {keys.WORKERS: "Serving"}),
    TrainingChart("Resident memory, MB", _MEMORY, scale=1e-6),
)


def training_charts(rows: Rows) -> str:
    """Charts of the training metrics; charts without data are omitted."""
    charts = (_REWARD_CHART, _custom_rewards(rows), *_TRAINING_CHARTS, _phase_times(rows))
    return "".join(_render_chart(chart, rows) for chart in charts)


def _render_chart(chart: TrainingChart, rows: Rows) -> str:
    series = [
        ChartSeries(name, [(row[keys.STEP], chart.scale * row[key]) for row in rows if key in row], color=1 + k % 5)
        for k, (key, name) in enumerate(chart.lines.items())
    ]
    return line_chart(chart.title, series, as_percent=chart.as_percent, y_log=chart.log)


def _custom_rewards(rows: Rows) -> TrainingChart:
    """Chart of reward parts specific to this run: costs, judge scores, parts of a user function."""
    parts = {key for row in rows for key in row if key.startswith(keys.REWARD_PREFIX)} - _REWARD_PARTS.keys()
    lines = {key: key.removeprefix(keys.REWARD_PREFIX).replace("_", " ") for key in sorted(parts)}
    return TrainingChart("Other reward parts", lines)


def _phase_times(rows: Rows) -> TrainingChart:
    """Chart of the five longest phases of a step."""
    totals: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        for key, seconds in row.items():
            if key.startswith(keys.TIME_PREFIX):
                totals[key] += seconds
    lines = {
        key: key.removeprefix(keys.TIME_PREFIX).removesuffix("_seconds").replace("_", " ")
        for key in sorted(totals, key=lambda key: -totals[key])[:5]
    }
    return TrainingChart("Seconds per step", lines)


def _stage_label(stage: str) -> str:
    """Format `cold_start` as `Cold start`, and short names like `rl` as `RL`."""
    label = stage.replace("_", " ")
    return label.upper() if len(label) <= 3 else label[:1].upper() + label[1:]


def stage_times(summary: Json) -> str:
    """Chart of the wall time per stage."""
    seconds = {stage: s for stage, s in summary.get("wall_s", {}).items() if stage != "total"}
    if not seconds:
        return ""
    largest = max(seconds.values()) or 1.0
    bars = "".join(
        bar(_stage_label(stage), format_duration(value), 100 * value / largest) for stage, value in seconds.items()
    )
    return figure("Wall time by stage", bars, wide=True)
