"""Complete ablation with real components, interrupted by SIGTERM and SIGKILL."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import pytest

from tests.small_run import (
    ROOT,
    SmallRun,
    descendants,
    run_vz_ray,
    send_signal,
    start_vz_ray,
    survivors,
    wait_for_exit,
    wait_until,
)
from vz_ray.config.ablation import VARIANTS
from vz_ray.config.data import SynthConfig
from vz_ray.data.episode_record import read_records
from vz_ray.eval.eval_log import count_answered
from vz_ray.needle.synthesis import synthesize

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    folder = tmp_path_factory.mktemp("small")
    sizes = {"train": 2, "sft": 4, "validation": 0, "test": 0}
    synthesize(SynthConfig(directory=str(folder / "needle"), shot_s=[4], workers=1, **sizes))
    return SmallRun(folder)


def arguments(small_run: SmallRun) -> list[str]:
    """Return arguments for one seed with the shipped base model; a random model would never zoom."""
    test_dir = small_run.folder / "test"
    return [
        "ablate",
        "name=all",
        *(item for item in small_run.overrides() if not item.startswith(("model=", "data.test=", "episode."))),
        f"model={ROOT / 'assets/tiny-base'}",
        f"data.test={test_dir / 'test.json'}",
        f"synth.directory={small_run.folder / 'needle'}",
        "synth.train=2",
        "synth.sft=4",
        "synth.validation=0",
        "synth.test=0",
        "synth.shot_s=[4]",
        "synth.workers=1",
        f"test_synth.directory={test_dir}",
        "test_synth.test=2",
        "test_synth.shot_s=[4]",
        "test_synth.workers=1",
        "seeds=[3]",
        "cold_start.max_steps=24",
        "cold_start.batch_size=8",
        "train.max_steps=2",
        "reflection.samples_per_task=3",
        "reflection.max_reflections=5",
        "eval.bootstrap_resamples=100",
    ]


def count_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def test_interrupted_ablation_resumes_and_reports(small_run: SmallRun) -> None:
    run = small_run.runs / "all"
    seed = run / "seed3"
    process = start_vz_ray(*arguments(small_run))
    wait_until(lambda: count_lines(seed / "cold_start/exemplars.jsonl") > 0, process, 400)
    children = descendants(process)
    send_signal(process)
    done = wait_for_exit(process, 120)
    assert done.returncode == 130, done.stderr
    assert not survivors(children)

    process = start_vz_ray(*arguments(small_run))
    wait_until(lambda: (seed / "full/checkpoints/step-000001").is_dir(), process, 500)
    send_signal(process, signal.SIGKILL)
    wait_for_exit(process, 120)
    assert not (seed / "full/models").exists()

    done = run_vz_ray(*arguments(small_run), timeout_s=600)
    assert done.returncode == 0, done.stderr
    assert_stages_ran_once(run, seed)
    assert_reflections_are_correct(seed)
    assert_results_are_written(run, done.stdout)

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert run_vz_ray(*arguments(small_run)).returncode == 0
    changed = {p.name for p in run.rglob("*") if p.is_file() and p.stat().st_mtime_ns != before.get(p)}
    assert changed <= {f"ablation.{kind}" for kind in ("json", "csv", "md", "html")} | {
        ".lock",
        "stages.jsonl",
    }


def assert_stages_ran_once(run: Path, seed: Path) -> None:
    for kind in ("exemplars", "reflections"):
        steps = [json.loads(line)["step"] for line in (seed / f"cold_start/{kind}.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 25))
    for variant in VARIANTS:
        stage = "cold_start" if variant == "without_rl" else "rl"
        assert count_answered(seed / variant / f"eval/{stage}.jsonl") == 8
        if variant != "without_rl":
            rows = [json.loads(line) for line in (seed / variant / "metrics.jsonl").read_text().splitlines()]
            assert [row["step"] for row in rows] == [0, 1]
            assert max(row["mismatch/logprob_abs_max"] for row in rows) <= 1e-4
    num_zero_weights = {v: (seed / v / "config.yaml").read_text().count("  tool: 0.0\n") for v in VARIANTS}
    assert num_zero_weights == {v: int(v == "without_tool_reward") for v in VARIANTS}
    # The episodes contain the reward that the variant was trained with.
    for variant, tool_weight in (("full", 0.5), ("without_tool_reward", 0.0)):
        for record in (r for path in (seed / variant / "episodes").glob("*") for r in read_records(path)):
            parts = record.trajectory.reward
            assert parts is not None
            assert parts.total == pytest.approx(0.9 * parts.accuracy + 0.1 * parts.format + tool_weight * parts.tool)


def assert_reflections_are_correct(seed: Path) -> None:
    counts = json.loads((seed / "cold_start/reflection/counts.json").read_text())
    assert counts["episodes"] == 4 * 4 * 3
    records = list(read_records(seed / "cold_start/reflection/reflections.jsonl"))
    assert 0 < len(records) == counts["sampled"] <= 5
    for record in records:
        assert record.trajectory.reward is not None
        assert record.trajectory.reward.accuracy == 1


def assert_results_are_written(run: Path, printed: str) -> None:
    results = json.loads((run / "ablation.json").read_text())
    assert list(results["variants"]) == list(VARIANTS)
    assert (results["questions"], results["videos"], results["seeds"]) == (8, 2, [3])
    assert len(results["claims"]) == 6
    assert {claim["questions"] for claim in results["claims"]} == {8}
    rows = list(csv.DictReader((run / "ablation.csv").open()))
    assert [(row["variant"], row["seed"]) for row in rows] == [
        (variant, seed) for variant in VARIANTS for seed in ("3", "all")
    ]
    assert "Needle world, 8 questions about 2 videos" in printed
    assert "| without tool reward |" in (run / "ablation.md").read_text()
    page = (run / "ablation.html").read_text()
    assert page.rstrip().endswith("</html>")
    assert "<svg" in page
