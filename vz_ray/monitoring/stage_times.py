"""Wall time of each stage of a run, in `stages.jsonl`."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from vz_ray.utils.json_lines import append_lines, read_complete_lines, to_json_line


def record_stage_time(run_dir: Path, stage: str, wall_s: float) -> None:
    """Append `wall_s` seconds to the time of `stage`; a resumed stage is recorded in parts."""
    append_lines(run_dir / "stages.jsonl", [to_json_line({"stage": stage, "wall_s": wall_s})])


def stage_seconds(run_dir: Path) -> dict[str, float]:
    """Return the wall seconds of each stage, in the order of the first start, and their `total`."""
    seconds: defaultdict[str, float] = defaultdict(float)
    path = run_dir / "stages.jsonl"
    for line in read_complete_lines(path) if path.exists() else ():
        seconds[line["stage"]] += line["wall_s"]
    return {**seconds, "total": sum(seconds.values())} if seconds else {}
