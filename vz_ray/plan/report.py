"""A plan for the terminal, and as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vz_ray.observe.spoken import duration
from vz_ray.plan.advice import Advice, Change
from vz_ray.plan.memory import GIB, Footprint, Known, When
from vz_ray.plan.planner import Assumptions, Plan
from vz_ray.plan.work import Work

_BAR = 30
"""Characters of a bar that fills a GPU."""
_COLOURS = {Known.EXACT: "green", Known.ESTIMATE: "yellow", Known.ASSUMED: "magenta"}
_WHILE = {When.ALWAYS: "", When.PASS: "in a pass", When.STEP: "in a step", When.LOAD: "while loading"}


def gib(size: int) -> str:
    return f"{size / GIB:,.2f}"


def page(plan: Plan, assumed: Assumptions, advice: Sequence[Advice]) -> RenderableType:
    """Everything, for `rich.console.Console.print`."""
    parts: list[RenderableType] = [_model(plan), *_tokens(plan, assumed)]
    for footprint in _footprints(plan):
        parts += _memory(footprint)
    parts.append(f"Host memory: at most {plan.host / GIB:.1f} GiB a learner rank, without its process")
    if plan.engine is not None:
        parts += _cache(plan)
    parts += [*_work(plan, assumed), ""]
    parts += [Text(f"Note: {note}.") for note in plan.notes]
    parts += _verdicts(plan)
    for one in advice:
        parts += _advice(one)
    return Group(*parts)


def to_json(plan: Plan, assumed: Assumptions, advice: Sequence[Advice]) -> dict[str, Any]:
    """The same as plain values; sizes in bytes, times in seconds."""
    return {
        **asdict(plan),
        "parameters": plan.shape.parameters,
        "memory": [
            {
                "who": one.who,
                "gpus": one.count,
                "capacity": one.capacity,
                "peak": one.peak,
                "worst": one.worst,
                "over": one.over,
                "fits": one.fits,
            }
            for one in _footprints(plan)
        ],
        "engine_starts": plan.engine.starts if plan.engine else None,
        "learner_over": plan.learner_over,
        "engine_over": plan.engine_over if plan.engine else None,
        "fits": plan.fits,
        "assumed": asdict(assumed),
        "advice": [asdict(one) for one in advice],
    }


def _footprints(plan: Plan) -> list[Footprint]:
    """One for each kind of GPU."""
    if plan.together is not None:
        return [plan.together]
    return [plan.learner, *([plan.engine.footprint] if plan.engine is not None else [])]


def _model(plan: Plan) -> Text:
    shape = plan.shape
    trained = "all" if plan.trained == shape.parameters else f"{plan.trained:,}"
    kind = {2: "bfloat16", 4: "float32"}[plan.width]
    return Text(
        f"{plan.command}, {plan.model}: {shape.parameters:,} weights, {shape.vision.parameters:,} of them in "
        f"the vision tower; {trained} trained in {kind}"
    )


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _caption(text: str) -> Text:
    return Text(text, style="italic")


def _tokens(plan: Plan, assumed: Assumptions) -> list[RenderableType]:
    most, usual = plan.longest, plan.usual
    table = _table("", "longest", "usual")
    rows: list[tuple[str, int, int]] = [
        ("frames of the overview", most.overview_frames, usual.overview_frames),
        ("frames of zooms", most.zoom_frames, usual.zoom_frames),
        ("visual tokens of a frame", most.frame.tokens, usual.frame.tokens),
        ("tokens before the first turn", most.prefix, usual.prefix),
        ("sampled tokens", most.sampled, usual.sampled),
        ("tokens in all", most.tokens, usual.tokens),
    ]
    for name, *values in rows:
        table.add_row(name, *(f"{value:,}" for value in values))
    caption = f"Usual is assumed: {assumed.zooms} zooms, {assumed.turn_tokens} tokens a turn"
    return [_heading("An episode"), table, _caption(f"{caption} (--zooms, --turn-tokens).")]


def _memory(footprint: Footprint) -> list[RenderableType]:
    """A bar for each part, and one for the sum at the worst moment; the scale is the GPU's memory."""
    gpus = "GPU" if footprint.count == 1 else "GPUs"
    table = _table("", "GiB")
    table.add_column("", no_wrap=True)
    table.add_column("")
    table.add_column("")
    whens = {part.when for part in footprint.parts}
    for part in footprint.parts:
        bar = _bar(part.bytes, footprint.capacity, _COLOURS[part.known])
        table.add_row(part.name, gib(part.bytes), bar, str(part.known), _WHILE[part.when])
    bar = _bar(footprint.peak, footprint.capacity, "green" if footprint.fits else "red")
    worst = _WHILE[footprint.worst] if footprint.worst in whens else ""
    table.add_row("most at one time", gib(footprint.peak), bar, "", worst, style="bold")
    table.add_row("of", gib(footprint.capacity))
    return [_heading(f"Memory of a GPU: {footprint.who}, {footprint.count} {gpus}"), table]


def _bar(size: int, capacity: int, colour: str) -> Text:
    """As long as the share of a GPU; what is beyond it is marked."""
    filled = min(_BAR, round(_BAR * size / capacity))
    over = min(_BAR // 3, max(0, round(_BAR * (size - capacity) / capacity)))
    bar = Text("█" * filled + "·" * (_BAR - filled), style=colour)
    return bar.append("▶" * max(over, int(size > capacity)), style="bold red")


def _cache(plan: Plan) -> list[RenderableType]:
    assert plan.engine is not None
    engine, table = plan.engine, _table("", "")
    table.show_header = False
    rows = [
        ("key/value cache, bytes a token and GPU", f"{engine.kv_bytes_per_token:,}"),
        ("tokens in it", f"{engine.kv_tokens:,}"),
        ("tokens that vLLM needs to start", f"{engine.needed:,}"),
        ("longest episodes in it, each on its own", f"{engine.episodes:,}"),
        (f"longest episodes in it, {plan.samples} of a task sharing its prompt", f"{engine.shared:,}"),
        ("frames whose features are kept", f"{engine.encoder_images:,}"),
        ("preprocessed frames in host memory", f"{engine.cached_frames:,}"),
        ("host memory of these, GiB", gib(engine.host)),
    ]
    for row in rows:
        table.add_row(*row)
    return [_heading("An engine's caches"), table]


def _work(plan: Plan, assumed: Assumptions) -> list[RenderableType]:
    unit = "iteration" if plan.command == "train" else "step"
    count = plan.groups * plan.samples
    columns = ["one sequence each", *(["shared prefixes"] if plan.packed else [])]
    table = _table("", *columns)
    ways = [plan.separate, *([plan.packed] if plan.packed else [])]
    for name, told in _work_rows(unit):
        table.add_row(name, *(told(way) for way in ways))
    passes = plan.passes
    split = f"; a group in {len(plan.packs)} packed sequences" if plan.packed else ""
    return [
        _heading(f"Arithmetic of the learner: {count:,} usual trajectories each {unit}"),
        table,
        _caption(
            f"Each is passed forward and backward {passes.updates} x, forward alone {passes.scores} x{split}."
        ),
        _caption(
            f"Assumed, not measured: {assumed.mfu:g} of {assumed.peak_tflops:g} TFLOPS is reached "
            "(--mfu, --peak-tflops)."
        ),
    ]


def _work_rows(unit: str) -> list[tuple[str, Any]]:
    return [
        ("tokens in a forward pass", lambda way: f"{way.tokens:,}"),
        (f"model PFLOP, {unit}", lambda way: f"{way.model_flops / 1e15:,.1f}"),
        ("PFLOP with what is computed twice", lambda way: f"{way.executed_flops / 1e15:,.1f}"),
        ("TFLOP of a trajectory", lambda way: f"{way.per_trajectory / 1e12:,.1f}"),
        (f"learning, {unit}", _spoken),
    ]


def _spoken(way: Work) -> str:
    return duration(way.seconds)


def _verdicts(plan: Plan) -> list[Text]:
    found = []
    for one in _footprints(plan):
        if one.fits:
            found.append(Text(f"{one.who}: fits, {gib(-one.over)} GiB to spare", style="green"))
        else:
            found.append(Text(f"{one.who}: does not fit, {gib(one.over)} GiB over", style="bold red"))
    engine = plan.engine
    if engine is not None and engine.footprint.fits and not engine.starts:
        lacking = f"{engine.kv_tokens:,} of {engine.needed:,} tokens fit its key/value cache"
        text = f"engine: does not start, {lacking}; {gib(plan.engine_over)} GiB lacking"
        found.append(Text(text, style="bold red"))
    return found


def _advice(advice: Advice) -> list[RenderableType]:
    table = _table("each by itself", "saves", "then")
    table.add_column("costs")
    for change in advice.alone:
        table.add_row(*_change(change))
    caption = "Not even all of them together are enough: take more memory, or shorter episodes."
    if advice.together is not None:
        settings, *rest = _change(advice.together)
        table.add_row(f"enough:\n{settings}", *rest, style="bold")
        caption = "The last row needs each of its changes. All were planned anew."
    return [_heading(f"What helps the {advice.who}, cheapest first"), table, _caption(caption)]


def _change(change: Change) -> tuple[str, str, str, str]:
    then = f"fits, {gib(-change.over)} to spare" if change.over <= 0 else f"{gib(change.over)} over"
    return "\n".join(change.settings), f"{gib(change.saves)} GiB", then, change.costs
