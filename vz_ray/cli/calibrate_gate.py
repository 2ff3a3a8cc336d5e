"""`vz-ray calibrate-gate`: thresholds of the zoom gate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import app


@app.command("calibrate-gate", rich_help_panel="Evaluation")
def calibrate_gate(
    log: Annotated[Path, typer.Argument(help="Evaluation log with episode.gate.mode=measure.")],
    out: Annotated[Path, typer.Option(help="Output file for episode.gate.thresholds_file.")] = Path("gate.json"),
    frame_cost: Annotated[
        float | None,
        typer.Option(
            help="Minimum accuracy gain per extra frame; default: maximum accuracy per frame.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Choose the uncertainty above which an episode zooms.

    Example: vz-ray calibrate-gate runs/eval/eval/needle.jsonl --out gate.json
    """
    from vz_ray.eval.gate_calibration import calibrate_from_log

    for kind, calibration in calibrate_from_log(log, out, frame_cost=frame_cost).items():
        print(f"{kind}: zoom above {calibration.best.threshold:.4f}, {calibration.num_questions} questions")
        policies = {"gated": calibration.best, "always": calibration.always, "never": calibration.never}
        for name, point in policies.items():
            scores = f"accuracy {point.accuracy:.4f}, frames {point.frames:.1f}, zooming {point.zoom_rate:.1%}"
            print(f"  {name}: {scores}")
    print(out)
