"""Wall times of the stages of a run: `stages.jsonl` in the run directory."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from vz_ray.data.episode_record import append_lines, read_complete_lines, to_json_line

STAGES_FILE = "stages.jsonl"


def record_stage_time(run_dir: Path, stage: str, wall_s: float) -> None:
    """Append the wall time of `stage`; a resumed stage adds one line per attempt."""
    append_lines(run_dir / STAGES_FILE, [to_json_line({"stage": stage, "wall_s": wall_s})])


def stage_seconds(run_dir: Path) -> dict[str, float]:
    """Return the total wall seconds by stage, in the order of first run, and their `total`."""
    seconds: defaultdict[str, float] = defaultdict(float)
    path = run_dir / STAGES_FILE
    for line in read_complete_lines(path) if path.exists() else ():
        seconds[line["stage"]] += line["wall_s"]
    return {**seconds, "total": sum(seconds.values())} if seconds else {}
