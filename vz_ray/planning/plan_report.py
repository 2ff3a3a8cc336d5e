"""Terminal page and JSON object of a resource plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vz_ray.config.run import GrpoRunConfig
from vz_ray.planning.advice import ConfigChange, MemoryAdvice, advise
from vz_ray.planning.assumptions import Assumptions
from vz_ray.planning.gpu_memory import GIB, Certainty, MemoryFootprint, MemoryPhase
from vz_ray.planning.learner_flops import LearnerWork
from vz_ray.planning.planner import PlannableConfig, ResourcePlan, make_plan
from vz_ray.planning.step_report import render_figures, render_steps, render_stop, render_timeouts, steps_to_json
from vz_ray.planning.step_time import StepPlan, plan_steps
from vz_ray.planning.teacher import TeacherPlan
from vz_ray.planning.timeouts import PlannedTimeout, plan_stop, plan_timeouts
from vz_ray.utils.durations import format_duration

_BAR_WIDTH = 30
"""Characters of a bar for the full memory of a GPU."""
_COLORS = {Certainty.EXACT: "green", Certainty.ESTIMATE: "yellow", Certainty.ASSUMED: "magenta"}


def format_gib(size: int) -> str:
    return f"{size / GIB:,.2f}"


@dataclass(frozen=True, slots=True)
class PlanReport:
    """All results of `vz-ray plan`.

    Attributes:
        plan: Memory, tokens and FLOPs.
        assumptions: GPUs and their speed.
        advice: Changes for components that do not fit.
        steps: Step times; None for SFT.
        timeouts: Timeouts of the run.
        stop: Seconds that a stop takes at most, and how they are computed.
        warnings: One line each.
    """

    plan: ResourcePlan
    assumptions: Assumptions
    advice: Sequence[MemoryAdvice]
    steps: StepPlan | None
    timeouts: Sequence[PlannedTimeout]
    stop: tuple[float, str]
    warnings: Sequence[str]


def make_report(config: PlannableConfig, assumptions: Assumptions, warnings: Sequence[str] = ()) -> PlanReport:
    """Plan a run and everything that follows from the plan.

    Raises:
        UserError: See `make_plan`.
    """
    plan = make_plan(config, assumptions)
    return PlanReport(
        plan,
        assumptions,
        advise(config, plan, assumptions),
        plan_steps(config, plan, assumptions) if isinstance(config, GrpoRunConfig) else None,
        plan_timeouts(config, assumptions, plan.shape),
        plan_stop(config, assumptions, plan.shape),
        warnings,
    )


def render_plan(report: PlanReport) -> RenderableType:
    """Return the full page for `rich.console.Console.print`."""
    plan, assumptions = report.plan, report.assumptions
    parts: list[RenderableType] = [_model(plan), *_tokens(plan, assumptions)]
    for footprint in plan.footprints:
        parts += _memory(footprint)
    parts.append(f"Host memory: at most {plan.host_bytes / GIB:.1f} GiB per learner rank, excluding its process")
    if plan.engine is not None:
        parts += _caches(plan)
    parts += _work(plan, assumptions)
    if report.steps is not None:
        parts += render_steps(report.steps)
    if plan.teacher is not None:
        parts.append(_teacher(plan.teacher))
    parts += [*render_timeouts(report.timeouts), render_stop(report.stop)]
    parts += [*render_figures(assumptions, rollout=plan.engine is not None), ""]
    parts += [Text(f"Warning: {warning}", style="yellow") for warning in report.warnings]
    parts += [Text(f"Note: {note}.") for note in plan.notes]
    parts += _results(plan)
    for component_advice in report.advice:
        parts += _advice(component_advice)
    return Group(*parts)


def plan_to_json(report: PlanReport) -> dict[str, Any]:
    """Return the plan as JSON values; sizes in bytes, times in seconds."""
    plan = report.plan
    return {
        **asdict(plan),
        "parameters": plan.shape.parameters,
        "memory": [
            {
                "component": footprint.component,
                "num_gpus": footprint.num_gpus,
                "capacity_bytes": footprint.capacity_bytes,
                "peak_bytes": footprint.peak_bytes,
                "peak_phase": footprint.peak_phase,
                "bytes_over": footprint.bytes_over,
                "fits": footprint.fits,
            }
            for footprint in plan.footprints
        ],
        "engine_can_start": plan.engine.can_start if plan.engine else None,
        "learner_bytes_over": plan.learner_bytes_over,
        "engine_bytes_over": plan.engine_bytes_over if plan.engine else None,
        "teacher_bytes_over": plan.teacher.bytes_over if plan.teacher else None,
        "fits": plan.fits,
        "steps": steps_to_json(report.steps),
        "timeouts": [asdict(timeout) for timeout in report.timeouts],
        "stop": {"seconds": report.stop[0], "reason": report.stop[1]},
        "assumptions": asdict(report.assumptions),
        "warnings": list(report.warnings),
        "advice": [asdict(component_advice) for component_advice in report.advice],
    }


def _model(plan: ResourcePlan) -> Text:
    shape = plan.shape
    trained = "all" if plan.trainable_params == shape.parameters else f"{plan.trainable_params:,}"
    dtype = {2: "bfloat16", 4: "float32"}[plan.weight_bytes]
    return Text(
        f"{plan.command}, {plan.model}: {shape.parameters:,} parameters ({shape.vision.parameters:,} in the "
        f"vision tower), {trained} trained in {dtype}"
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


def _tokens(plan: ResourcePlan, assumptions: Assumptions) -> list[RenderableType]:
    longest, typical = plan.longest, plan.typical
    table = _table("", "longest", "typical")
    rows: list[tuple[str, int, int]] = [
        ("overview frames", longest.overview_frames, typical.overview_frames),
        ("zoom frames", longest.zoom_frames, typical.zoom_frames),
        ("visual tokens per frame", longest.frame.tokens, typical.frame.tokens),
        ("tokens before the first turn", longest.prefix_tokens, typical.prefix_tokens),
        ("sampled tokens", longest.sampled_tokens, typical.sampled_tokens),
        ("total tokens", longest.tokens, typical.tokens),
    ]
    for name, *values in rows:
        table.add_row(name, *(f"{value:,}" for value in values))
    caption = f"Typical is assumed: {assumptions.zooms} zooms, {assumptions.turn_tokens} tokens per turn"
    return [_heading("Episode"), table, _caption(f"{caption} (--zooms, --turn-tokens).")]


def _memory(footprint: MemoryFootprint) -> list[RenderableType]:
    """Return a bar for each item and for the peak; the scale is the GPU's memory."""
    gpus = "GPU" if footprint.num_gpus == 1 else "GPUs"
    table = _table("", "GiB")
    table.add_column("", no_wrap=True)
    table.add_column("")
    table.add_column("")
    for item in footprint.items:
        bar = _bar(item.bytes, footprint.capacity_bytes, _COLORS[item.certainty])
        table.add_row(item.name, format_gib(item.bytes), bar, str(item.certainty), _phase(item.phase))
    bar = _bar(footprint.peak_bytes, footprint.capacity_bytes, "green" if footprint.fits else "red")
    has_peak_phase = any(item.phase is footprint.peak_phase for item in footprint.items)
    phase = _phase(footprint.peak_phase) if has_peak_phase else ""
    table.add_row("peak", format_gib(footprint.peak_bytes), bar, "", phase, style="bold")
    table.add_row("capacity", format_gib(footprint.capacity_bytes))
    return [_heading(f"GPU memory: {footprint.component}, {footprint.num_gpus} {gpus}"), table]


def _phase(phase: MemoryPhase) -> str:
    return "" if phase is MemoryPhase.ALWAYS else phase.value


def _bar(size: int, capacity: int, color: str) -> Text:
    """Return a bar for the fraction of a GPU; arrows mark the excess."""
    filled = min(_BAR_WIDTH, round(_BAR_WIDTH * size / capacity))
    over = min(_BAR_WIDTH // 3, max(0, round(_BAR_WIDTH * (size - capacity) / capacity)))
    bar = Text("█" * filled + "·" * (_BAR_WIDTH - filled), style=color)
    return bar.append("▶" * max(over, int(size > capacity)), style="bold red")


def _caches(plan: ResourcePlan) -> list[RenderableType]:
    assert plan.engine is not None
    engine, table = plan.engine, _table("", "")
    table.show_header = False
    rows = [
        ("KV cache, bytes per token and GPU", f"{engine.kv_bytes_per_token:,}"),
        ("KV cache, tokens", f"{engine.kv_tokens:,}"),
        ("minimum tokens for vLLM to start", f"{engine.min_kv_tokens:,}"),
        ("longest episodes in the KV cache", f"{engine.max_episodes:,}"),
        (
            f"longest episodes in the KV cache, prompt shared by {plan.group_size} samples",
            f"{engine.max_episodes_shared_prefix:,}",
        ),
        ("frames in the encoder cache", f"{engine.encoder_cache_images:,}"),
        ("preprocessed frames in host memory", f"{engine.mm_cache_frames:,}"),
        ("host memory of preprocessed frames, GiB", format_gib(engine.host_bytes)),
    ]
    for row in rows:
        table.add_row(*row)
    return [_heading("Engine caches"), table]


def _work(plan: ResourcePlan, assumptions: Assumptions) -> list[RenderableType]:
    count = plan.batch_size * plan.group_size
    table = _table("", "one sequence each", *(["shared prefixes"] if plan.packed_work else []))
    works = [plan.unpacked_work, *([plan.packed_work] if plan.packed_work else [])]
    for name, format_value in _WORK_ROWS:
        table.add_row(name, *(format_value(work) for work in works))
    passes = plan.passes
    split = f"; {len(plan.branches_per_sequence)} packed sequences per group" if plan.packed_work else ""
    return [
        _heading(f"Learner FLOPs: {count:,} typical trajectories per step"),
        table,
        _caption(
            f"Passes per trajectory: {passes.updates} forward and backward, {passes.forward_only} forward only{split}."
        ),
        _caption(
            f"{'Measured' if 'mfu' in assumptions.measured else 'Assumed, not measured'}: {assumptions.mfu:.2f} of "
            f"{assumptions.peak_tflops:g} TFLOPS (--mfu, --peak-tflops)."
        ),
    ]


_WORK_ROWS: list[tuple[str, Callable[[LearnerWork], str]]] = [
    ("tokens per forward pass", lambda work: f"{work.tokens:,}"),
    ("model PFLOP per step", lambda work: f"{work.model_flops / 1e15:,.1f}"),
    ("PFLOP per step with recomputation", lambda work: f"{work.executed_flops / 1e15:,.1f}"),
    ("TFLOP per trajectory", lambda work: f"{work.per_trajectory / 1e12:,.1f}"),
    ("learner time per step", lambda work: format_duration(work.seconds)),
]


def _teacher(teacher: TeacherPlan) -> Text:
    gpus = "GPU" if teacher.num_gpus == 1 else "GPUs"
    return Text(
        f"Teacher: {teacher.num_gpus} more {gpus}. It scores a step in {format_duration(teacher.step_s)} while "
        f"episodes are sampled; the last group takes {format_duration(teacher.group_s)} more. "
        "The rollout above includes both."
    )


def _results(plan: ResourcePlan) -> list[Text]:
    lines = []
    for footprint in plan.footprints:
        component, over = footprint.component, footprint.bytes_over
        if footprint.fits:
            lines.append(Text(f"{component}: fits, {format_gib(-over)} GiB free", style="green"))
        else:
            lines.append(Text(f"{component}: does not fit, {format_gib(over)} GiB over", style="bold red"))
    engines = {"engine": plan.engine, "teacher": None if plan.teacher is None else plan.teacher.memory}
    for component, engine in engines.items():
        if engine is not None and engine.footprint.fits and not engine.can_start:
            reason = f"the KV cache holds {engine.kv_tokens:,} of {engine.min_kv_tokens:,} tokens"
            text = f"{component}: does not start, {reason}; {format_gib(engine.bytes_over)} GiB missing"
            lines.append(Text(text, style="bold red"))
    return lines


def _advice(advice: MemoryAdvice) -> list[RenderableType]:
    table = _table("single change", "saves", "result")
    table.add_column("cost")
    for change in advice.single_changes:
        table.add_row(*_change(change))
    caption = "All changes together are not enough: use more memory or shorter episodes."
    if advice.combined_change is not None:
        settings, *columns = _change(advice.combined_change)
        table.add_row(f"sufficient:\n{settings}", *columns, style="bold")
        caption = "The last row needs all of its changes. Every row was planned."
    return [_heading(f"Changes for the {advice.component}, cheapest first"), table, _caption(caption)]


def _change(change: ConfigChange) -> tuple[str, str, str, str]:
    over = change.bytes_over_after
    result = f"fits, {format_gib(-over)} GiB free" if over <= 0 else f"{format_gib(over)} GiB over"
    return "\n".join(change.settings), f"{format_gib(change.bytes_saved)} GiB", result, change.cost
