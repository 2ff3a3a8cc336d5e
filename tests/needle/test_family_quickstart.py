"""A complete small quickstart of each family beside Qwen2.5-VL, which `test_quickstart` covers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.small_run import SmallRun, run_vz_ray
from vz_ray.families import FAMILIES
from vz_ray.needle.tiny_families import TINY_FAMILIES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MAX_DIFFERENCE = {"float32": 1e-4, "bfloat16": 0.1}
"""Maximum difference of log-probs between engine and learner, by the engine's dtype."""


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen2_5_vl"])
def test_quickstart_of_family_runs_every_stage(family: str, tmp_path: Path) -> None:
    small_run = SmallRun.create(tmp_path, family)
    done = run_vz_ray("quickstart", "--name", "whole", *small_run.quickstart(), timeout_s=550)
    assert done.returncode == 0, done.stderr
    summary = json.loads((small_run.runs / "whole/summary.json").read_text())
    assert set(summary["accuracy"]) == {"cold_start", "rl", "sft_continued", "uniform"}
    assert summary["weights"]["published"] == 2
    assert 0 <= summary["mismatch"]["logprob_abs_max"] <= MAX_DIFFERENCE[TINY_FAMILIES[family].engine_dtype]
    assert (small_run.runs / "whole/report.html").is_file()


def test_model_of_other_family_is_refused(tmp_path: Path) -> None:
    small_run = SmallRun.create(tmp_path, "qwen3_vl")
    done = run_vz_ray("quickstart", *small_run.quickstart(), "family=qwen2_5_vl")
    assert done.returncode == 2
    assert "set family=qwen3_vl" in done.stderr
