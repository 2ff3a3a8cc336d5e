"""Sections of the run report: tiles, charts and tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vz_ray.monitoring import metric_names
from vz_ray.report.markup import escape, format_number, format_percent, stage_title
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
        tiles.append(
            _tile("Accuracy", format_percent(accuracy), _points(gains.get("over_cold_start"), "the cold start"))
        )
        if frames := summary.get("uniform_baseline_frames"):
            uniform = summary["accuracy"].get("uniform", {}).get(str(frames))
            gain = _points(gains.get("over_uniform"), "uniform frames")
            tiles.append(
                _tile(f"Uniform, {frames} frames", format_percent(uniform), f"The agent: {gain}" if gain else "")
            )
        tiles.append(
            _tile(
                "Frames seen",
                format_number(row["frames_mean"]),
                f"95th percentile {format_number(row['frames_p95'])}",
            )
        )
        valid = f"{format_percent(row['valid_zoom_rate'])} valid"
        tiles.append(_tile("Zooms per question", format_number(row["zooms_mean"], 2), valid))
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
    rows = []
    for stage in _stages(summary.get("evaluations", {})):
        accuracy = summary["evaluations"][stage]["accuracy"]
        if accuracy is None:
            continue
        low, high, mean = (100 * accuracy[name] for name in ("low", "high", "mean"))
        color = 2 if _UNIFORM.fullmatch(stage) else 1
        title = f"{low:.1f} to {high:.1f}%, {accuracy['count']} questions"
        rows.append(
            f'<div class="bar s{color}" title="{title}"><span>{escape(stage_title(stage))}</span>'
            f'<div class="track"><b style="width:{mean:.2f}%"></b>'
            f'<i style="left:{low:.2f}%;width:{high - low:.2f}%"></i></div><em>{mean:.1f}%</em></div>'
        )
    if not rows:
        return ""
    note = f"Lines are {100 * summary['interval_level']:g}% intervals, resampled over whole videos."
    return (
        f"<figure><figcaption>Accuracy on held-out questions</figcaption>{''.join(rows)}"
        f'<p class="note">{note}</p></figure>'
    )


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
        color = _COLORS[stage]
        name = f"Agent {stage_title(stage)[0].lower()}{stage_title(stage)[1:]}"
        series.append(ChartSeries(name, [point], color=color, markers=True, whiskers=[interval]))
    marks = [x for x, _ in curve]
    return line_chart(
        "Accuracy against frames seen", series,
        x_label="frames (logarithmic)", as_percent=True, x_log=True, x_ticks=marks,
    )  # fmt: skip


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
    rows = ""
    for name in shares[stages[0]]:
        if not any(shares[stage].get(name) for stage in stages):
            continue
        for stage, color in colors.items():
            share = shares[stage].get(name, 0.0)
            label = escape(name.replace("_", " ")) if stage == stages[0] else ""
            title = escape(f"{stage_title(stage)}: {failures[stage].get(name, 0)} of {num_episodes[stage]} episodes")
            bar = f'<b style="width:{100 * share / largest:.2f}%"></b>' if share else ""
            rows += (
                f'<div class="bar s{color}" title="{title}"><span>{label}</span>'
                f'<div class="track">{bar}</div><em>{100 * share:.1f}%</em></div>'
            )
    legend = "".join(f'<span class="s{k}"><i></i>{escape(stage_title(s))}</span>' for s, k in colors.items())
    return (
        '<figure class="wide"><figcaption>Failure modes, % of all episodes</figcaption>'
        f'<div class="legend">{legend}</div>{rows}</figure>'
    )


def question_kind_table(summary: Json) -> str:
    """Table of accuracy by question kind, one column per evaluation."""
    evaluations = summary.get("evaluations", {})
    stages = [stage for stage in _stages(evaluations) if evaluations[stage]["accuracy_by_kind"]]
    kinds = sorted({kind for stage in stages for kind in evaluations[stage]["accuracy_by_kind"]})
    if not kinds:
        return ""
    head = "".join(f"<th>{escape(stage_title(stage))}</th>" for stage in stages)
    body = ""
    for kind in kinds:
        cells = (evaluations[stage]["accuracy_by_kind"].get(kind) for stage in stages)
        values = "".join(f"<td>{format_percent(cell and cell['mean'])}</td>" for cell in cells)
        body += f"<tr><th>{escape(kind)}</th>{values}</tr>"
    return _table("Accuracy by kind of question", f"<th></th>{head}", body)


def evaluations_table(summary: Json) -> str:
    """Table of all metrics of all evaluations."""
    evaluations = summary.get("evaluations", {})
    if not evaluations:
        return ""
    columns = {
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
    head = "<th></th>" + "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        f"<tr><th>{escape(stage_title(stage))}</th>"
        + "".join(f"<td>{escape(cell(evaluations[stage]))}</td>" for cell in columns.values())
        + "</tr>"
        for stage in _stages(evaluations)
    )
    return _table("All metrics", head, body)


def _table(title: str, head: str, body: str) -> str:
    return (
        f'<figure class="wide"><figcaption>{escape(title)}</figcaption><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></figure>"
    )


def _line(rows: Rows, metric: str, title: str, color: int, scale: float = 1.0) -> ChartSeries:
    return ChartSeries(
        title, [(row[metric_names.STEP], scale * row[metric]) for row in rows if metric in row], color=color
    )


def training_charts(rows: Rows) -> str:
    """Charts of the training metrics; charts without data are omitted."""

    def chart(
        title: str,
        lines: Sequence[tuple[str, str]],
        *,
        pct: bool = False,
        log: bool = False,
        scale: float = 1.0,
    ) -> str:
        series = [_line(rows, metric, name, color, scale) for color, (metric, name) in enumerate(lines, start=1)]
        return line_chart(title, series, as_percent=pct, y_log=log)

    return "".join(
        [
            chart(
                "Reward and its parts, unweighted",
                [
                    (metric_names.REWARD_TOTAL, "Total"),
                    (metric_names.REWARD_ACCURACY, "Accuracy"),
                    (metric_names.REWARD_FORMAT, "Format"),
                    (metric_names.REWARD_TOOL, "Tool"),
                ],
            ),
            custom_reward_parts(rows),
            chart(
                "Zooming",
                [
                    (metric_names.ZOOM_CALL_RATE, "Episodes that zoom"),
                    (metric_names.ZOOM_VALID_RATE, "Valid calls"),
                ],
                pct=True,
            ),
            chart("Episodes with the event in a zoom", [(metric_names.EVENT_COVERAGE, "Coverage")], pct=True),
            chart("Zooms per episode", [(metric_names.ZOOMS_PER_EPISODE, "Zooms")]),
            chart("Frames per episode", [(metric_names.FRAMES_PER_EPISODE, "Frames")]),
            chart("Entropy, nats per token", [(metric_names.ENTROPY, "Entropy")]),
            chart("KL to the reference model, nats", [(metric_names.KL_TO_REFERENCE, "KL")]),
            chart("Gradient norm", [(metric_names.GRAD_NORM, "Norm")]),
            chart(
                "Engine against learner, nats",
                [
                    (metric_names.MISMATCH_LOGPROB_MAX, "Maximum log-prob difference"),
                    (metric_names.MISMATCH_KL, "KL"),
                ],
                log=True,
            ),
            chart("Weight sync, seconds from pause to resume", [(metric_names.WEIGHT_SYNC_SECONDS, "Sync")]),
            chart(
                "Engine cache hit rates",
                [
                    (metric_names.PREFIX_CACHE_HIT_RATE, "Prompt tokens"),
                    (metric_names.FRAME_CACHE_HIT_RATE, "Frames"),
                ],
                pct=True,
            ),
            chart("Rollout workers", [(metric_names.WORKERS, "Serving")]),
            chart(
                "Resident memory, MB",
                [
                    (metric_names.DRIVER_MEMORY, "Driver"),
                    (metric_names.WORKER_MEMORY, "Worker"),
                    (metric_names.ENGINE_MEMORY, "Engine"),
                ],
                scale=1e-6,
            ),
            step_times(rows),
        ]
    )


def custom_reward_parts(rows: Rows) -> str:
    """Chart of reward parts specific to this run: costs, judge scores, parts of a user function."""
    standard_parts = {
        metric_names.REWARD_TOTAL,
        metric_names.REWARD_ACCURACY,
        metric_names.REWARD_FORMAT,
        metric_names.REWARD_TOOL,
    }
    extra_parts = {name for row in rows for name in row if name.startswith(metric_names.REWARD_PREFIX)} - standard_parts
    lines = [
        _line(rows, name, name.removeprefix(metric_names.REWARD_PREFIX).replace("_", " "), 1 + k % 5)
        for k, name in enumerate(sorted(extra_parts))
    ]
    return line_chart("Other reward parts", lines)


def step_times(rows: Rows) -> str:
    """Chart of the time per step: the five longest phases."""
    totals: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(metric_names.TIME_PREFIX):
                totals[name] = totals.get(name, 0.0) + value
    largest = sorted(totals, key=lambda name: -totals[name])[:5]
    lines = [
        _line(
            rows,
            name,
            name.removeprefix(metric_names.TIME_PREFIX).removesuffix("_seconds").replace("_", " "),
            color,
        )
        for color, name in enumerate(largest, start=1)
    ]
    return line_chart("Seconds per step", lines)


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
    rows = "".join(
        f'<div class="bar s1"><span>{escape(_stage_label(stage))}</span><div class="track">'
        f'<b style="width:{100 * value / largest:.2f}%"></b></div><em>{format_duration(value)}</em></div>'
        for stage, value in seconds.items()
    )
    return f'<figure class="wide"><figcaption>Wall time by stage</figcaption>{rows}</figure>'
