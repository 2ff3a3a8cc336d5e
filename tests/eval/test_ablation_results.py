"""Claims of an ablation, against cases that can be counted by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.eval.conftest import Make
from vz_ray.config.ablation import VARIANTS
from vz_ray.config.eval import EvalConfig
from vz_ray.eval.ablation_results import (
    CLAIMS,
    ClaimStatus,
    build_ablation_results,
    claim_status,
    write_ablation_files,
)
from vz_ray.eval.ablation_tables import ablation_markdown, ablation_notes, print_ablation, write_markdown
from vz_ray.eval.bootstrap import ConfidenceInterval, bootstrap_mean, crossed_bootstrap
from vz_ray.eval.eval_log import EvalResult

CONFIG = EvalConfig(bootstrap_resamples=500)


# -- the bootstrap ------------------------------------------------------------------


def test_two_videos_and_one_run_give_the_three_means_that_there_are() -> None:
    """Drawing two of two videos: both the first in 1/4, both the second in 1/4, one of each in 1/2."""
    run, videos = {"a": 0.0, "b": 1.0}, {"a": "v", "b": "w"}
    wide = crossed_bootstrap([run], videos, num_resamples=4000, confidence_level=0.95)
    assert (wide.mean, wide.low, wide.high, wide.count) == (0.5, 0.0, 1.0, 2)
    narrow = crossed_bootstrap([run], videos, num_resamples=4000, confidence_level=0.4)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_runs_are_drawn_too() -> None:
    """All questions of a run alike, so that nothing but the draw of runs varies."""
    videos = {str(n): n for n in range(50)}
    runs = [dict.fromkeys(videos, value) for value in (0.0, 1.0)]
    found = crossed_bootstrap(runs, videos, num_resamples=4000)
    assert (found.mean, found.low, found.high, found.count) == (0.5, 0.0, 1.0, 100)
    same = crossed_bootstrap([runs[1], runs[1]], videos)
    assert (same.low, same.high) == (1.0, 1.0)


def test_one_run_is_the_bootstrap_over_videos() -> None:
    rng = np.random.default_rng(1)
    values = {f"t{n}": float(rng.random() < 0.6) for n in range(400)}
    videos = {task: f"v{n // 4}" for n, task in enumerate(values)}
    crossed = crossed_bootstrap([values], videos, num_resamples=4000)
    plain = bootstrap_mean(list(values.values()), list(videos.values()), num_resamples=4000)
    assert crossed.mean == plain.mean
    assert crossed.low == pytest.approx(plain.low, abs=0.01)
    assert crossed.high == pytest.approx(plain.high, abs=0.01)


def test_questions_count_alike_however_many_a_video_has() -> None:
    runs = [{"a": 1.0, "b": 1.0, "c": 0.0}, {"a": 1.0, "c": 0.0}]
    found = crossed_bootstrap(runs, {"a": "v", "b": "v", "c": "w"}, num_resamples=200)
    assert (found.mean, found.count) == (3 / 5, 5)


def test_a_run_without_values_is_no_run() -> None:
    with pytest.raises(ValueError, match="1 of 2 runs have values"):
        crossed_bootstrap([{"a": 1.0}, {}], {"a": "v"})


# -- verdicts -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.01, 0.05, ClaimStatus.SHOWN),
        (0.0, 0.05, ClaimStatus.NOT_SHOWN),
        (-0.01, 0.05, ClaimStatus.NOT_SHOWN),
        (-0.05, 0.0, ClaimStatus.NOT_SHOWN),
        (-0.05, -0.01, ClaimStatus.REVERSED),
    ],
)
def test_a_claim_is_shown_only_where_the_whole_interval_is_on_its_side(low, high, verdict) -> None:
    assert claim_status(ConfidenceInterval((low + high) / 2, low, high, 1000)) is verdict


# -- the whole ----------------------------------------------------------------------

ZOOMED = [[12.0]]


def runs(make: Make, right: dict[str, int], zooms: dict[str, int]) -> dict[str, dict[int, list[EvalResult]]]:
    """Two seeds of 40 questions: the first `right` are right, each with so many zooms."""
    return {
        name: {
            seed: [
                make(f"t{n}", right=n < right[name], zooms=ZOOMED * zooms[name], video=f"v{n % 20}")
                for n in range(40)
            ]
            for seed in (0, 1)
        }
        for name in right
    }


@pytest.fixture
def as_the_paper(make: Make) -> dict[str, dict[int, list[EvalResult]]]:
    right = dict(zip(VARIANTS, (40, 5, 10, 25, 30), strict=True))
    zooms = dict(zip(VARIANTS, (2, 2, 0, 1, 0), strict=True))
    return runs(make, right, zooms)


def test_the_paper_s_order_holds_where_every_difference_is_shown(as_the_paper) -> None:
    found = build_ablation_results(as_the_paper, CONFIG)
    assert [(c["metric"], c["greater"], c["lesser"]) for c in found["claims"]] == [
        ("accuracy", "full", "without_tool_reward"),
        ("accuracy", "full", "without_reflection"),
        ("accuracy", "full", "without_cold_start"),
        ("accuracy", "full", "without_rl"),
        ("zooms", "full", "without_reflection"),
        ("zooms", "without_reflection", "without_tool_reward"),
    ]
    assert len(found["claims"]) == len(CLAIMS)
    assert {claim["verdict"] for claim in found["claims"]} == {"shown"}
    assert found["order_holds"]
    assert (found["questions"], found["videos"], found["seeds"]) == (40, 20, [0, 1])
    assert found["claims"][0]["difference"]["mean"] == 0.25
    assert found["claims"][0]["seeds"] == {"0": 0.25, "1": 0.25}
    assert found["variants"]["full"]["zooms"]["mean"] == 2
    assert found["variants"]["without_rl"]["paper"]["accuracy"]["longvideoreason/accuracy"] == 63.3
    assert found["variants"]["without_tool_reward"]["paper"]["zooms"] == 0
    assert ablation_notes(found)[0] == "the paper's order holds: every difference is shown"


def test_where_it_does_not_hold_the_table_says_so(make: Make) -> None:
    right = dict(zip(VARIANTS, (20, 5, 10, 20, 35), strict=True))
    zooms = dict(zip(VARIANTS, (1, 2, 0, 1, 0), strict=True))
    found = build_ablation_results(runs(make, right, zooms), CONFIG)
    verdicts = {(c["metric"], c["lesser"]): c["verdict"] for c in found["claims"]}
    assert verdicts["accuracy", "without_tool_reward"] == "reversed"
    assert verdicts["accuracy", "without_reflection"] == "not shown"
    assert not found["order_holds"]
    assert ablation_notes(found)[0] == (
        "the paper's order is not shown as a whole. reversed: accuracy of full > without tool reward. "
        "not shown: accuracy of full > without reflection; zooms of full > without reflection"
    )


def test_only_the_same_questions_of_the_same_seed_are_compared(make: Make) -> None:
    full = {0: [make("a"), make("b")], 1: [make("a"), make("b")]}
    other = {1: [make("a", right=False), make("b", valid=False)], 2: [make("a", right=False)]}
    found = build_ablation_results({"full": full, "without_rl": other}, CONFIG)
    (claim,) = found["claims"]
    assert claim["seeds"] == {"1": 1.0}
    assert (claim["questions"], claim["difference"]["count"]) == (1, 1)
    assert found["variants"]["without_rl"]["invalid"] == 1


def test_what_has_not_been_run_is_left_out_and_the_order_is_not_called_shown(
    as_the_paper, make: Make
) -> None:
    some = {name: as_the_paper[name] for name in ("full", "without_rl")}
    found = build_ablation_results({**some, "without_reflection": {}}, CONFIG)
    assert list(found["variants"]) == ["full", "without_rl"]
    assert not found["order_holds"]
    assert "not all of its variants were run" in ablation_notes(found)[0]
    nothing = build_ablation_results({"full": {}}, CONFIG)
    assert (nothing["claims"], nothing["variants"]) == ([], {})


def test_one_seed_is_called_that(make: Make) -> None:
    found = build_ablation_results({"full": {0: [make("a"), make("b")]}}, CONFIG)
    assert any(line.startswith("one seed: nothing is said") for line in ablation_notes(found))


def test_files_and_tables_hold_the_figures_and_the_paper_s(as_the_paper, tmp_path: Path, capsys) -> None:
    found = {
        **build_ablation_results(as_the_paper, CONFIG),
        "reflections": {"0": {"episodes": 384, "learned from": 96}},
    }
    write_ablation_files(tmp_path, found)
    write_markdown(tmp_path, found)
    assert json.loads((tmp_path / "ablation.json").read_text()) == found
    rows = {(r["variant"], r["seed"]): r for r in csv.DictReader((tmp_path / "ablation.csv").open())}
    assert len(rows) == 5 * 3
    assert float(rows["without_reflection", "all"]["full_minus_this"]) == 0.375
    assert rows["without_reflection", "all"]["verdict"] == "shown"
    assert float(rows["without_reflection", "1"]["accuracy"]) == 0.625
    assert rows["full", "all"]["verdict"] == ""
    print_ablation(found, Console(width=150))
    printed = capsys.readouterr().out
    for text in (printed, ablation_markdown(found), (tmp_path / "ablation.md").read_text()):
        assert "accuracy: full > without tool reward" in text
        assert "80.3" in text
        assert "reflections of seed 0: 384 episodes, 96 learned from" in text
