"""Commands for this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from vz_ray.cli.app import app
from vz_ray.utils.console import make_console
from vz_ray.utils.errors import UserError


@app.command(rich_help_panel="On this machine")
def doctor(
    runs: Annotated[Path, typer.Option(help="Parent of run directories.")] = Path("runs"),
    gpu: Annotated[bool, typer.Option("--gpu", help="Check NVIDIA GPUs, too: driver, kernels, NCCL.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """Check this machine and its environment, and print a fix for each problem.

    With --gpu, measured figures are written to gpu-check.json in the parent of run directories.

    Example: vz-ray doctor

    Example: vz-ray doctor --gpu --runs /runs
    """
    from vz_ray.jobs.doctor import run_checks
    from vz_ray.monitoring.checks import check_table, failed_checks

    checks = run_checks(runs)
    if gpu:
        from vz_ray.jobs.gpu_checks import run_gpu_checks

        checks += run_gpu_checks(runs / "gpu-check.json")
    if as_json:
        import json

        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        make_console().print(check_table(checks))
    raise typer.Exit(1 if failed_checks(checks) else 0)


@app.command(rich_help_panel="On this machine")
def clip(
    video: Annotated[str, typer.Argument(help="A video file or URL.")],
    segment: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Start and end of a zoom in seconds.", show_default=False),
    ] = None,
    fps: Annotated[
        float, typer.Option(help="Frames per second; default: 2 for a zoom, 0.5 for an overview.", min=0)
    ] = 0.0,
    overview: Annotated[bool, typer.Option("--overview", help="Sample the whole video.")] = False,
    max_frames: Annotated[int, typer.Option(help="Maximum frames of an overview.", min=1)] = 64,
    max_pixels: Annotated[int, typer.Option(help="Maximum area of a frame in pixels.", min=1)] = 100_352,
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint directory with the frame grid; default: that of Qwen2.5-VL.", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for the images.", show_default=False)] = None,
    cache: Annotated[bool, typer.Option(help="Use the disk cache of frames.")] = True,
    decoder: Annotated[Literal["pyav", "torchcodec"], typer.Option(help="Decoder library.")] = "pyav",
) -> None:
    """Write the frames of a zoom or an overview, as the model sees them, and print their times.

    Example: vz-ray clip talk.mp4 --segment 12.5 20 --fps 2 --out frames/

    Example: vz-ray clip talk.mp4 --overview --model models/Qwen3-VL-8B-Instruct --max-pixels 131072
    """
    from vz_ray.config.clips import ClipsConfig
    from vz_ray.decode.clip_preview import preview_clip, preview_size, print_preview
    from vz_ray.decode.reader_factory import build_reader
    from vz_ray.video.frame import OverviewRequest, ZoomRequest

    if (segment is None) != overview:
        raise UserError("got none or both of --segment START END and --overview; give one")
    request = OverviewRequest(fps or 0.5, max_frames) if segment is None else ZoomRequest(*segment, fps or 2.0)
    size = preview_size(model, max_pixels)
    config = ClipsConfig(decoder=decoder)
    if not cache:
        config.disk_cache_gib = 0
    print_preview(preview_clip(video, request, size, out, build_reader(config)))
