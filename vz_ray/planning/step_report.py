"""Terminal tables of step times, timeouts, and the sources of the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from vz_ray.planning.assumptions import Assumptions
from vz_ray.planning.gpu_memory import GIB
from vz_ray.planning.step_time import StepPlan, StepTime
from vz_ray.planning.timeouts import PlannedTimeout
from vz_ray.utils.durations import format_duration


def render_steps(steps: StepPlan) -> list[RenderableType]:
    """Return the table of step times and the recommendation."""
    table = Table(box=None, pad_edge=False)
    for index, heading in enumerate(("", "engines", "ranks", "rollout", "learning", "publish", "switch", "step", "")):
        table.add_column(heading, justify="right" if index in range(1, 8) else "left")
    for name, step in (("as configured", steps.configured), *((step.mode, step) for step in steps.alternatives)):
        seconds = (step.rollout_s, step.learner.seconds, step.publish_s, step.switch_s, step.seconds)
        cells = [str(step.engines), str(step.ranks), *(f"{value:,.0f} s" for value in seconds)]
        label = f"{name}, {step.mode}" if step is steps.configured else name
        fits = "" if step.fits else f"does not fit: {step.bytes_over / GIB:,.1f} GiB over"
        table.add_row(label, *cells, fits, style="bold" if step is steps.recommended else "")
    title = Text(f"\nStep time on {steps.num_gpus} GPUs, estimated", style="bold")
    return [title, table, Text(_recommendation(steps), style="green")]


def _recommendation(steps: StepPlan) -> str:
    step, saved = steps.recommended, steps.configured.seconds - steps.recommended.seconds
    if step is steps.configured:
        return f"Recommended: as configured. {steps.reason[:1].upper()}{steps.reason[1:]}."
    gain = f", {format_duration(saved)} shorter" if saved > 0 else ""
    return (
        f"Recommended: {step.mode}, {step.engines} engines and {step.ranks} ranks, {format_duration(step.seconds)} per "
        f"step{gain}: {steps.reason}.\n  {' '.join(step.settings)}"
    )


def render_stop(stop: tuple[float, str]) -> Text:
    """Return the line with the time of a stop; see `plan_stop`."""
    return Text(f"A stop takes at most {stop[0]:,.0f} s: {stop[1]}. Give jobs this time: vz-ray submit --grace-s.")


def render_timeouts(timeouts: Sequence[PlannedTimeout]) -> list[RenderableType]:
    """Return the table of timeouts and their reasons."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for timeout in timeouts:
        table.add_row(f"timeouts.{timeout.key}", f"{timeout.seconds:,.0f} s", timeout.reason)
    return [Text("\nTimeouts", style="bold"), table]


def render_figures(assumptions: Assumptions, *, rollout: bool) -> list[RenderableType]:
    """Return the figures of the GPUs and whether each was measured."""
    a = assumptions
    rows = [
        ("gpu_bytes", "GPU memory", f"{a.gpu_bytes / GIB:.1f} GiB"),
        ("mfu", "learner, fraction of the peak (--mfu)", f"{a.mfu:.2f} of {a.peak_tflops:g} TFLOP/s"),
        ("host_gbps", "host to GPU", f"{a.host_gbps:g} GB/s"),
        ("node_gbps", "between GPUs of a node", f"{a.node_gbps:g} GB/s"),
        ("network_gbps", "between nodes, per GPU", f"{a.network_gbps:g} GB/s"),
        ("storage_gbps", "checkpoints", f"{a.storage_gbps:g} GB/s"),
    ]
    if rollout:
        rows[2:2] = [
            ("prefill_mfu", "prefill, fraction of the peak", f"{a.prefill_mfu:.2f} of {a.peak_tflops:g} TFLOP/s"),
            (
                "decode_share",
                "sampling, fraction of memory bandwidth",
                f"{a.decode_share:.2f} of {a.memory_gbps:g} GB/s",
            ),
            ("shm_gbps", "weights to shared memory", f"{a.shm_gbps:g} GB/s"),
        ]
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column()
    for name, label, value in rows:
        table.add_row(label, value, "measured" if name in a.measured else "assumed")
    source = f" measured in {a.measured_in}" if a.measured_in else "; `vz-ray doctor --gpu` measures it"
    return [Text(f"\nFigures: {a.gpu}{source}", style="bold"), table]


def steps_to_json(steps: StepPlan | None) -> dict[str, Any] | None:
    """Return the step times as JSON values, in seconds."""
    if steps is None:
        return None
    return {
        "num_gpus": steps.num_gpus,
        "configured": _step_to_json(steps.configured),
        "alternatives": [_step_to_json(step) for step in steps.alternatives],
        "recommended": _step_to_json(steps.recommended),
        "reason": steps.reason,
    }


def _step_to_json(step: StepTime) -> dict[str, Any]:
    return {**asdict(step), "learn_s": step.learner.seconds, "seconds": step.seconds, "fits": step.fits}
