"""A plan for the terminal, and as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vz_ray.planning.advice import ConfigChange, MemoryAdvice
from vz_ray.planning.gpu_memory import GIB, Certainty, MemoryFootprint, MemoryPhase
from vz_ray.planning.learner_flops import LearnerWork
from vz_ray.planning.planner import Assumptions, ResourcePlan
from vz_ray.utils.durations import format_duration

_BAR = 30
"""Characters of a bar that fills a GPU."""
_COLOURS = {Certainty.EXACT: "green", Certainty.ESTIMATE: "yellow", Certainty.ASSUMED: "magenta"}
_WHILE = {
    MemoryPhase.ALWAYS: "",
    MemoryPhase.FORWARD_BACKWARD: "in a pass",
    MemoryPhase.OPTIMIZER_STEP: "in a step",
    MemoryPhase.LOADING: "while loading",
}


def format_gib(size: int) -> str:
    return f"{size / GIB:,.2f}"


def render_plan(plan: ResourcePlan, assumed: Assumptions, advice: Sequence[MemoryAdvice]) -> RenderableType:
    """Everything, for `rich.console.Console.print`."""
    parts: list[RenderableType] = [_model(plan), *_tokens(plan, assumed)]
    for footprint in _footprints(plan):
        parts += _memory(footprint)
    parts.append(f"Host memory: at most {plan.host_bytes / GIB:.1f} GiB a learner rank, without its process")
    if plan.engine is not None:
        parts += _cache(plan)
    parts += [*_work(plan, assumed), ""]
    parts += [Text(f"Note: {note}.") for note in plan.notes]
    parts += _verdicts(plan)
    for one in advice:
        parts += _advice(one)
    return Group(*parts)


def plan_to_json(plan: ResourcePlan, assumed: Assumptions, advice: Sequence[MemoryAdvice]) -> dict[str, Any]:
    """The same as plain values; sizes in bytes, times in seconds."""
    return {
        **asdict(plan),
        "parameters": plan.shape.parameters,
        "memory": [
            {
                "who": one.component,
                "gpus": one.num_gpus,
                "capacity": one.capacity_bytes,
                "peak": one.peak_bytes,
                "worst": one.peak_phase,
                "over": one.bytes_over,
                "fits": one.fits,
            }
            for one in _footprints(plan)
        ],
        "engine_starts": plan.engine.can_start if plan.engine else None,
        "learner_over": plan.learner_bytes_over,
        "engine_over": plan.engine_bytes_over if plan.engine else None,
        "fits": plan.fits,
        "assumed": asdict(assumed),
        "advice": [asdict(one) for one in advice],
    }


def _footprints(plan: ResourcePlan) -> list[MemoryFootprint]:
    """One for each kind of GPU."""
    if plan.shared_gpu is not None:
        return [plan.shared_gpu]
    return [plan.learner, *([plan.engine.footprint] if plan.engine is not None else [])]


def _model(plan: ResourcePlan) -> Text:
    shape = plan.shape
    trained = "all" if plan.trainable_params == shape.parameters else f"{plan.trainable_params:,}"
    kind = {2: "bfloat16", 4: "float32"}[plan.weight_bytes]
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


def _tokens(plan: ResourcePlan, assumed: Assumptions) -> list[RenderableType]:
    most, usual = plan.longest, plan.typical
    table = _table("", "longest", "usual")
    rows: list[tuple[str, int, int]] = [
        ("frames of the overview", most.overview_frames, usual.overview_frames),
        ("frames of zooms", most.zoom_frames, usual.zoom_frames),
        ("visual tokens of a frame", most.frame.tokens, usual.frame.tokens),
        ("tokens before the first turn", most.prefix_tokens, usual.prefix_tokens),
        ("sampled tokens", most.sampled_tokens, usual.sampled_tokens),
        ("tokens in all", most.tokens, usual.tokens),
    ]
    for name, *values in rows:
        table.add_row(name, *(f"{value:,}" for value in values))
    caption = f"Usual is assumed: {assumed.zooms} zooms, {assumed.turn_tokens} tokens a turn"
    return [_heading("An episode"), table, _caption(f"{caption} (--zooms, --turn-tokens).")]


def _memory(footprint: MemoryFootprint) -> list[RenderableType]:
    """A bar for each part, and one for the sum at the worst moment; the scale is the GPU's memory."""
    gpus = "GPU" if footprint.num_gpus == 1 else "GPUs"
    table = _table("", "GiB")
    table.add_column("", no_wrap=True)
    table.add_column("")
    table.add_column("")
    whens = {part.phase for part in footprint.items}
    for part in footprint.items:
        bar = _bar(part.bytes, footprint.capacity_bytes, _COLOURS[part.certainty])
        table.add_row(part.name, format_gib(part.bytes), bar, str(part.certainty), _WHILE[part.phase])
    bar = _bar(footprint.peak_bytes, footprint.capacity_bytes, "green" if footprint.fits else "red")
    worst = _WHILE[footprint.peak_phase] if footprint.peak_phase in whens else ""
    table.add_row("most at one time", format_gib(footprint.peak_bytes), bar, "", worst, style="bold")
    table.add_row("of", format_gib(footprint.capacity_bytes))
    return [_heading(f"Memory of a GPU: {footprint.component}, {footprint.num_gpus} {gpus}"), table]


def _bar(size: int, capacity: int, colour: str) -> Text:
    """As long as the share of a GPU; what is beyond it is marked."""
    filled = min(_BAR, round(_BAR * size / capacity))
    over = min(_BAR // 3, max(0, round(_BAR * (size - capacity) / capacity)))
    bar = Text("█" * filled + "·" * (_BAR - filled), style=colour)
    return bar.append("▶" * max(over, int(size > capacity)), style="bold red")


def _cache(plan: ResourcePlan) -> list[RenderableType]:
    assert plan.engine is not None
    engine, table = plan.engine, _table("", "")
    table.show_header = False
    rows = [
        ("key/value cache, bytes a token and GPU", f"{engine.kv_bytes_per_token:,}"),
        ("tokens in it", f"{engine.kv_tokens:,}"),
        ("tokens that vLLM needs to start", f"{engine.min_kv_tokens:,}"),
        ("longest episodes in it, each on its own", f"{engine.max_episodes:,}"),
        (
            f"longest episodes in it, {plan.group_size} of a task sharing its prompt",
            f"{engine.max_episodes_shared_prefix:,}",
        ),
        ("frames whose features are kept", f"{engine.encoder_cache_images:,}"),
        ("preprocessed frames in host memory", f"{engine.mm_cache_frames:,}"),
        ("host memory of these, GiB", format_gib(engine.host_bytes)),
    ]
    for row in rows:
        table.add_row(*row)
    return [_heading("An engine's caches"), table]


def _work(plan: ResourcePlan, assumed: Assumptions) -> list[RenderableType]:
    unit = "iteration" if plan.command == "train" else "step"
    count = plan.batch_size * plan.group_size
    columns = ["one sequence each", *(["shared prefixes"] if plan.packed_work else [])]
    table = _table("", *columns)
    ways = [plan.unpacked_work, *([plan.packed_work] if plan.packed_work else [])]
    for name, told in _work_rows(unit):
        table.add_row(name, *(told(way) for way in ways))
    passes = plan.passes
    split = f"; a group in {len(plan.branches_per_sequence)} packed sequences" if plan.packed_work else ""
    return [
        _heading(f"Arithmetic of the learner: {count:,} usual trajectories each {unit}"),
        table,
        _caption(
            f"Each is passed forward and backward {passes.updates} x, forward alone {passes.forward_only} x{split}."
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


def _spoken(way: LearnerWork) -> str:
    return format_duration(way.seconds)


def _verdicts(plan: ResourcePlan) -> list[Text]:
    found = []
    for one in _footprints(plan):
        if one.fits:
            found.append(
                Text(f"{one.component}: fits, {format_gib(-one.bytes_over)} GiB to spare", style="green")
            )
        else:
            found.append(
                Text(
                    f"{one.component}: does not fit, {format_gib(one.bytes_over)} GiB over", style="bold red"
                )
            )
    engine = plan.engine
    if engine is not None and engine.footprint.fits and not engine.can_start:
        lacking = f"{engine.kv_tokens:,} of {engine.min_kv_tokens:,} tokens fit its key/value cache"
        text = f"engine: does not start, {lacking}; {format_gib(plan.engine_bytes_over)} GiB lacking"
        found.append(Text(text, style="bold red"))
    return found


def _advice(advice: MemoryAdvice) -> list[RenderableType]:
    table = _table("each by itself", "saves", "then")
    table.add_column("costs")
    for change in advice.single_changes:
        table.add_row(*_change(change))
    caption = "Not even all of them together are enough: take more memory, or shorter episodes."
    if advice.combined_change is not None:
        settings, *rest = _change(advice.combined_change)
        table.add_row(f"enough:\n{settings}", *rest, style="bold")
        caption = "The last row needs each of its changes. All were planned anew."
    return [_heading(f"What helps the {advice.component}, cheapest first"), table, _caption(caption)]


def _change(change: ConfigChange) -> tuple[str, str, str, str]:
    then = (
        f"fits, {format_gib(-change.bytes_over_after)} to spare"
        if change.bytes_over_after <= 0
        else f"{format_gib(change.bytes_over_after)} over"
    )
    return "\n".join(change.settings), f"{format_gib(change.bytes_saved)} GiB", then, change.cost
