"""What came out of playing benchmarks: `benchmarks.json`, `benchmarks.csv` and a log of marks per question.

In the JSON, by benchmark and mode: official figures read strictly and
leniently, how far answers got, and what an episode cost.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vz_ray.config.evaluate import EvaluateConfig
from vz_ray.data.record import to_line
from vz_ray.episode.trajectory import RewardParts
from vz_ray.evaluate.benchmarks import Benchmark, Mark, Marked, Missing, Reading, scored
from vz_ray.evaluate.benchmarks.marks import LEFT_OUT
from vz_ray.evaluate.metrics import measure
from vz_ray.evaluate.modes import Mode
from vz_ray.evaluate.paper import paper
from vz_ray.evaluate.results import EvalResult
from vz_ray.observe.run_dir import write_atomic
from vz_ray.reward import UNPARSED

Json = dict[str, Any]

JSON, CSV, SAMPLES = "benchmarks.json", "benchmarks.csv", "samples"


@dataclass(frozen=True, slots=True)
class Played:
    """One benchmark with the questions that were to be played.

    Attributes:
        key: Its name in the run.
        adapter: What read it; the paper's numbers are looked up by this.
        benchmark: What was read.
        asked: Questions to be played, after sampling and without those whose videos are missing.
        missing: Videos that are not there; their questions are not among those.
        marks: By mode, what every question that was played is worth.
    """

    key: str
    adapter: str
    benchmark: Benchmark
    asked: int
    missing: Missing
    marks: Mapping[Mode, Sequence[Marked]]


def outcome(played: Sequence[Played], config: EvaluateConfig, models: Mapping[str, str]) -> Json:
    """All figures of a run, as JSON values; `models` are checkpoints by label, the run's own first."""
    return {
        "models": dict(models),
        "interval_level": config.level,
        "paper": {"source": paper().source, "shown": list(paper().shown)},
        "benchmarks": {one.key: _benchmark(one, config) for one in played},
    }


def _benchmark(one: Played, config: EvaluateConfig) -> Json:
    return {
        "title": one.benchmark.title,
        "adapter": one.adapter,
        "released": one.benchmark.released,
        "read": len(one.benchmark.tasks),
        "asked": one.asked,
        "missing": {
            "videos": len(one.missing.videos),
            "of": one.missing.of,
            "questions": one.missing.questions,
            "paths": list(one.missing.videos),
        },
        "notes": list(one.benchmark.notes),
        "modes": {str(mode): _mode(one, marked, config) for mode, marked in one.marks.items()},
    }


def _mode(one: Played, marked: Sequence[Marked], config: EvaluateConfig) -> Json:
    strict = one.benchmark.figures(scored(marked, lambda sample: sample.strict))
    lenient = {
        (figure.table, figure.name): figure.value
        for figure in one.benchmark.figures(scored(marked, lambda sample: sample.lenient))
    }
    return {
        "figures": [
            {
                "table": figure.table,
                "name": figure.name,
                "strict": figure.value,
                "lenient": lenient[figure.table, figure.name],
                "count": figure.count,
                "scale": figure.scale,
                "paper": dict(paper().of(one.adapter, _path(figure.table, figure.name))),
            }
            for figure in strict
        ],
        "readings": {
            "strict": _readings(sample.strict for sample in marked),
            "lenient": _readings(sample.lenient for sample in marked),
        },
        "metrics": measure([as_scored(sample) for sample in marked], config).to_dict(),
    }


def _path(table: str, name: str) -> str:
    return f"{table}/{name}" if table else name


def _readings(marks: Iterator[Mark]) -> dict[str, int]:
    counts = Counter(mark.reading for mark in marks)
    return {reading.value: counts[reading] for reading in Reading}


def as_scored(sample: Marked) -> EvalResult:
    """The result with its strict mark in place of the reward it was played for."""
    mark, played = sample.strict, sample.result.trajectory
    before = played.reward or RewardParts(0.0, 0.0, 0.0, 0.0)
    note = {Reading.UNPARSED: UNPARSED, Reading.READ: ""}.get(mark.reading, mark.reading.value)
    reward = replace(before, accuracy=mark.score, valid=mark.reading not in LEFT_OUT, note=note)
    return replace(sample.result, trajectory=replace(played, reward=reward))


# -- files ------------------------------------------------------------------------


def write_outcome(run: Path, found: Json) -> None:
    """Writes `benchmarks.json` and `benchmarks.csv`, each whole or not at all."""
    text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(run / JSON, text.encode())
    file = io.StringIO(newline="")
    rows = list(_rows(found))
    writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(run / CSV, file.getvalue().encode())


def _rows(found: Json) -> Iterator[Json]:
    """One row per figure, costs repeated; shares and figures as shown, in per cent or grades."""
    for key, benchmark in found["benchmarks"].items():
        for mode, played in benchmark["modes"].items():
            cost, readings = played["metrics"], played["readings"]["strict"]
            for figure in played["figures"]:
                yield {
                    "benchmark": key,
                    "mode": mode,
                    "table": figure["table"],
                    "figure": figure["name"],
                    **{name: shown(figure[name], figure["scale"]) for name in ("strict", "lenient")},
                    **{model: figure["paper"].get(model) for model in found["paper"]["shown"]},
                    "count": figure["count"],
                    "asked": benchmark["asked"],
                    "frames_mean": cost["frames_mean"],
                    "frames_p95": cost["frames_p95"],
                    "zooms_mean": cost["zooms_mean"],
                    "valid_zoom_rate": cost["valid_zoom_rate"],
                    "zoom_hit_rate": cost["event_coverage"],
                    "seconds_mean": cost["seconds_mean"],
                    **{reading.value: readings[reading.value] for reading in Reading},
                    "missing_questions": benchmark["missing"]["questions"],
                }


def shown(value: float | None, scale: float) -> float | None:
    """A figure as tables have it."""
    return None if value is None else value * scale


def write_samples(run: Path, one: Played) -> None:
    """`samples/<benchmark>/<mode>.jsonl`: a line per question with its marks, both readings, and its cost."""
    for mode, marked in one.marks.items():
        path = run / SAMPLES / one.key / f"{mode.stage}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(to_line(_sample(sample)) for sample in marked).encode())


def _sample(sample: Marked) -> Json:
    task, played = sample.task, sample.result.trajectory
    return {
        "task": task.task_id,
        "kind": task.kind,
        "video": task.video,
        "truth": task.answer,
        "strict": _mark(sample.strict),
        "lenient": _mark(sample.lenient),
        "status": played.status.value,
        "said": played.turns[-1].text if played.turns else "",
        "frames": len(played.refs),
        "zooms": len(played.zooms),
        "zooms_tried": played.zooms_tried,
        "seconds": played.seconds,
        "error": played.error,
    }


def _mark(mark: Mark) -> Json:
    return {
        "reading": mark.reading.value,
        "score": mark.score,
        "answer": mark.answer,
        "detail": dict(mark.detail),
    }
