"""Ablation claims and bootstrap intervals against hand-computed cases."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.eval.conftest import MakeResult
from vz_ray.config.ablation import VARIANTS
from vz_ray.config.run import EvalConfig
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


def test_crossed_bootstrap_of_two_videos_has_three_means() -> None:
    """Two of two videos: the first twice in 1/4 of the resamples, the second twice in 1/4, both in 1/2."""
    run, videos = {"a": 0.0, "b": 1.0}, {"a": "v", "b": "w"}
    wide = crossed_bootstrap([run], videos, EvalConfig(4000))
    assert (wide.mean, wide.low, wide.high, wide.count) == (0.5, 0.0, 1.0, 2)
    narrow = crossed_bootstrap([run], videos, EvalConfig(4000, 0.4))
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_crossed_bootstrap_resamples_runs() -> None:
    """All questions of a run have the same value, so only the resampling of runs adds variance."""
    videos = {str(n): n for n in range(50)}
    runs = [dict.fromkeys(videos, value) for value in (0.0, 1.0)]
    interval = crossed_bootstrap(runs, videos, EvalConfig(4000))
    assert (interval.mean, interval.low, interval.high, interval.count) == (0.5, 0.0, 1.0, 100)
    same = crossed_bootstrap([runs[1], runs[1]], videos)
    assert (same.low, same.high) == (1.0, 1.0)


def test_crossed_bootstrap_of_one_run_equals_bootstrap_mean() -> None:
    rng = np.random.default_rng(1)
    values = {f"t{n}": float(rng.random() < 0.6) for n in range(400)}
    videos = {task: f"v{n // 4}" for n, task in enumerate(values)}
    crossed = crossed_bootstrap([values], videos, EvalConfig(4000))
    plain = bootstrap_mean(list(values.values()), list(videos.values()), EvalConfig(4000))
    assert crossed.mean == plain.mean
    assert crossed.low == pytest.approx(plain.low, abs=0.01)
    assert crossed.high == pytest.approx(plain.high, abs=0.01)


def test_crossed_bootstrap_weights_questions_equally() -> None:
    runs = [{"a": 1.0, "b": 1.0, "c": 0.0}, {"a": 1.0, "c": 0.0}]
    interval = crossed_bootstrap(runs, {"a": "v", "b": "v", "c": "w"}, EvalConfig(200))
    assert (interval.mean, interval.count) == (3 / 5, 5)


def test_crossed_bootstrap_rejects_run_without_values() -> None:
    with pytest.raises(ValueError, match="1 of 2 runs have values"):
        crossed_bootstrap([{"a": 1.0}, {}], {"a": "v"})


# -- claims -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "status"),
    [
        (0.01, 0.05, ClaimStatus.SUPPORTED),
        (0.0, 0.05, ClaimStatus.INCONCLUSIVE),
        (-0.01, 0.05, ClaimStatus.INCONCLUSIVE),
        (-0.05, 0.0, ClaimStatus.INCONCLUSIVE),
        (-0.05, -0.01, ClaimStatus.REVERSED),
    ],
)
def test_claim_status_follows_the_whole_interval(low, high, status) -> None:
    assert claim_status(ConfidenceInterval((low + high) / 2, low, high, 1000)) is status


# -- results ------------------------------------------------------------------------

ZOOMED = [[12.0]]


def make_runs(
    make_result: MakeResult, correct: dict[str, int], zooms: dict[str, int]
) -> dict[str, dict[int, list[EvalResult]]]:
    """Two seeds of 40 questions: the first `correct` are correct, all with the variant's number of zooms."""
    return {
        name: {
            seed: [
                make_result(f"t{n}", correct=n < correct[name], zooms=ZOOMED * zooms[name], video=f"v{n % 20}")
                for n in range(40)
            ]
            for seed in (0, 1)
        }
        for name in correct
    }


@pytest.fixture
def paper_runs(make_result: MakeResult) -> dict[str, dict[int, list[EvalResult]]]:
    """Results in which every claim of the paper holds."""
    correct = dict(zip(VARIANTS, (40, 5, 10, 25, 30), strict=True))
    zooms = dict(zip(VARIANTS, (2, 2, 0, 1, 0), strict=True))
    return make_runs(make_result, correct, zooms)


def test_order_holds_if_all_claims_are_supported(paper_runs) -> None:
    ablation = build_ablation_results(paper_runs, CONFIG)
    assert [(c["metric"], c["greater"], c["lesser"]) for c in ablation["claims"]] == [
        ("accuracy", "full", "without_tool_reward"),
        ("accuracy", "full", "without_reflection"),
        ("accuracy", "full", "without_cold_start"),
        ("accuracy", "full", "without_rl"),
        ("zooms", "full", "without_reflection"),
        ("zooms", "without_reflection", "without_tool_reward"),
    ]
    assert len(ablation["claims"]) == len(CLAIMS)
    assert {claim["status"] for claim in ablation["claims"]} == {"supported"}
    assert ablation["order_holds"]
    assert (ablation["questions"], ablation["videos"], ablation["seeds"]) == (40, 20, [0, 1])
    assert ablation["claims"][0]["difference"]["mean"] == 0.25
    assert ablation["claims"][0]["seeds"] == {"0": 0.25, "1": 0.25}
    assert ablation["variants"]["full"]["zooms"]["mean"] == 2
    assert ablation["variants"]["without_rl"]["paper"]["accuracy"]["longvideoreason/accuracy"] == 63.3
    assert ablation["variants"]["without_tool_reward"]["paper"]["zooms"] == 0
    assert ablation_notes(ablation)[0] == "the paper's order holds: every claim is supported"


def test_notes_list_reversed_and_inconclusive_claims(make_result: MakeResult) -> None:
    correct = dict(zip(VARIANTS, (20, 5, 10, 20, 35), strict=True))
    zooms = dict(zip(VARIANTS, (1, 2, 0, 1, 0), strict=True))
    ablation = build_ablation_results(make_runs(make_result, correct, zooms), CONFIG)
    statuses = {(c["metric"], c["lesser"]): c["status"] for c in ablation["claims"]}
    assert statuses["accuracy", "without_tool_reward"] == "reversed"
    assert statuses["accuracy", "without_reflection"] == "inconclusive"
    assert not ablation["order_holds"]
    assert ablation_notes(ablation)[0] == (
        "the paper's order is not fully supported. reversed: accuracy of full > without tool reward. "
        "inconclusive: accuracy of full > without reflection; zooms of full > without reflection"
    )


def test_claims_compare_common_questions_of_common_seeds(make_result: MakeResult) -> None:
    full = {0: [make_result("a"), make_result("b")], 1: [make_result("a"), make_result("b")]}
    other = {
        1: [make_result("a", correct=False), make_result("b", valid=False)],
        2: [make_result("a", correct=False)],
    }
    ablation = build_ablation_results({"full": full, "without_rl": other}, CONFIG)
    (claim,) = ablation["claims"]
    assert claim["seeds"] == {"1": 1.0}
    assert (claim["questions"], claim["difference"]["count"]) == (1, 1)
    assert ablation["variants"]["without_rl"]["invalid"] == 1


def test_order_does_not_hold_if_variants_have_no_results(paper_runs, make_result: MakeResult) -> None:
    two_variants = {name: paper_runs[name] for name in ("full", "without_rl")}
    ablation = build_ablation_results({**two_variants, "without_reflection": {}}, CONFIG)
    assert list(ablation["variants"]) == ["full", "without_rl"]
    assert not ablation["order_holds"]
    assert "some variants have no results" in ablation_notes(ablation)[0]
    empty = build_ablation_results({"full": {}}, CONFIG)
    assert (empty["claims"], empty["variants"]) == ([], {})


def test_notes_warn_about_a_single_seed(make_result: MakeResult) -> None:
    ablation = build_ablation_results({"full": {0: [make_result("a"), make_result("b")]}}, CONFIG)
    assert any(note.startswith("one seed: intervals do not include") for note in ablation_notes(ablation))


def test_ablation_files_and_tables_agree(paper_runs, tmp_path: Path, capsys) -> None:
    ablation = {
        **build_ablation_results(paper_runs, CONFIG),
        "reflections": {"0": {"episodes": 384, "learned from": 96}},
    }
    write_ablation_files(tmp_path, ablation)
    write_markdown(tmp_path, ablation)
    assert json.loads((tmp_path / "ablation.json").read_text()) == ablation
    rows = {(r["variant"], r["seed"]): r for r in csv.DictReader((tmp_path / "ablation.csv").open())}
    assert len(rows) == 5 * 3
    assert float(rows["without_reflection", "all"]["full_minus_this"]) == 0.375
    assert rows["without_reflection", "all"]["status"] == "supported"
    assert float(rows["without_reflection", "1"]["accuracy"]) == 0.625
    assert rows["full", "all"]["status"] == ""
    print_ablation(ablation, Console(width=150))
    printed = capsys.readouterr().out
    for text in (printed, ablation_markdown(ablation), (tmp_path / "ablation.md").read_text()):
        assert "accuracy: full > without tool reward" in text
        assert "80.3" in text
        assert "reflections of seed 0: 384 episodes, 96 learned from" in text
