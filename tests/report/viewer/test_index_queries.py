"""Filters, sorting and neighbours, compared with a Python implementation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vz_ray.report.viewer.episode_index import SORT_COLUMNS
from vz_ray.report.viewer.index_queries import MAX_ROWS, EpisodeFilter
from vz_ray.report.viewer.viewer_session import ViewerSession

Row = dict[str, Any]


@pytest.fixture(scope="module")
def session(made_run: Path, tmp_path_factory: pytest.TempPathFactory) -> ViewerSession:
    session = ViewerSession(made_run, tmp_path_factory.mktemp("query") / "index.sqlite")
    session.follower.catch_up()
    return session


@pytest.fixture(scope="module")
def rows(session: ViewerSession) -> list[Row]:
    return list(session.page(EpisodeFilter(), "newest", True, 0, MAX_ROWS)["rows"])


@pytest.mark.parametrize(
    ("where", "fits"),
    [
        (EpisodeFilter(), lambda row: True),
        (EpisodeFilter(stage="rl"), lambda row: row["stage"] == "rl"),
        (EpisodeFilter(step_from=2, step_to=3), lambda row: 2 <= row["step"] <= 3),
        (EpisodeFilter(reward_from=1.0), lambda row: row["reward"] >= 1.0),
        (EpisodeFilter(reward_to=0.5), lambda row: row["reward"] <= 0.5),
        (EpisodeFilter(kind="count"), lambda row: row["kind"] == "count"),
        (EpisodeFilter(zooms=0), lambda row: row["zooms"] == 0),
        (EpisodeFilter(zooms=2), lambda row: row["zooms"] == 2),
        (EpisodeFilter(outcome="right"), lambda row: row["outcome"] == "right"),
        (EpisodeFilter(outcome="zoomed_elsewhere"), lambda row: row["failure"] == "zoomed_elsewhere"),
        (EpisodeFilter(text="HOW MANY times"), lambda row: "How many times" in row["question"]),
        (EpisodeFilter(text="needle-1-"), lambda row: "needle-1-" in row["task"]),
        (EpisodeFilter(kind="decoy", outcome="wrong"), lambda row: row["kind"] == "decoy" and row["failure"]),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)  # fmt: skip
def test_filter_matches_expected_rows(
    session: ViewerSession, rows: list[Row], where: EpisodeFilter, fits: Callable[[Row], bool]
) -> None:
    expected = [row for row in rows if fits(row)]
    answer = session.page(where, "newest", True, 0, MAX_ROWS)
    assert answer["rows"] == expected
    assert answer["total"] == len(expected) > 0


@pytest.mark.parametrize("text", ["100%", "_", "\\", "'; DROP TABLE episodes; --"])
def test_search_escapes_wildcards(session: ViewerSession, rows: list[Row], text: str) -> None:
    matching = [row for row in rows if any(text in str(row[name]) for name in ("question", "answer", "truth"))]
    assert session.page(EpisodeFilter(text=text), "newest", True, 0, MAX_ROWS)["rows"] == matching


def test_zooms_or_more_includes_higher_counts(session: ViewerSession) -> None:
    many = session.filter_options()["many_zooms"]
    assert session.page(EpisodeFilter(zooms=many), "newest", False, 0, 60)["total"] == 0


@pytest.mark.parametrize("sort", SORT_COLUMNS)
@pytest.mark.parametrize("ascending", [True, False])
def test_pages_cover_the_sorted_list(session: ViewerSession, rows: list[Row], sort: str, ascending: bool) -> None:
    parts = [session.page(EpisodeFilter(), sort, ascending, offset, 7)["rows"] for offset in range(0, len(rows), 7)]
    listed = [row for part in parts for row in part]
    name = "id" if sort == "newest" else sort

    def key(row: Row) -> tuple[float, int]:
        return (-1e9 if row[name] is None else row[name], row["id"])

    assert listed == sorted(rows, key=key, reverse=not ascending)


@pytest.mark.parametrize("sort", ["newest", "reward", "advantage"])
@pytest.mark.parametrize("ascending", [True, False])
def test_neighbours_follow_the_list_order(session: ViewerSession, sort: str, ascending: bool) -> None:
    episode_filter = EpisodeFilter(kind="count")
    ids = [row["id"] for row in session.page(episode_filter, sort, ascending, 0, MAX_ROWS)["rows"]]
    for k, episode in enumerate(ids):
        expected = {
            "previous": ids[k - 1] if k else None,
            "next": ids[k + 1] if k + 1 < len(ids) else None,
        }
        assert session.neighbours(episode_filter, sort, ascending, episode) == expected


def test_charts_show_means_of_the_rows(session: ViewerSession, rows: list[Row]) -> None:
    answer = session.charts(EpisodeFilter(stage="train"))
    (stage,) = answer["stages"]
    for step, reward, zooms, right, count in stage["points"]:
        of_step = [row for row in rows if row["stage"] == "train" and row["step"] == step]
        assert count == len(of_step)
        assert reward == pytest.approx(sum(row["reward"] for row in of_step) / count)
        assert zooms == pytest.approx(sum(row["zooms"] for row in of_step) / count)
        assert right == pytest.approx(sum(row["outcome"] == "right" for row in of_step) / count)
    counted = {one["name"]: one["count"] for one in answer["outcomes"]}
    trained = [row for row in rows if row["stage"] == "train"]
    assert counted["right"] == sum(row["outcome"] == "right" for row in trained)
    assert sum(counted.values()) == len(trained)


def test_filter_options_count_every_episode(session: ViewerSession, rows: list[Row]) -> None:
    found = session.filter_options()
    for name in ("stages", "kinds", "zooms"):
        assert sum(count for _, count in found[name]) == len(rows)
    assert found["steps"] == [min(row["step"] for row in rows), max(row["step"] for row in rows)]


def test_group_has_every_sample_of_a_task_and_step(session: ViewerSession, rows: list[Row]) -> None:
    one = next(row for row in rows if row["stage"] == "train")
    group = session.group(one["id"])
    expected = [
        row["id"]
        for row in rows
        if (row["stage"], row["step"], row["task"]) == (one["stage"], one["step"], one["task"])
    ]
    assert sorted(sample["id"] for sample in group["samples"]) == expected
    assert [sample["sample"] for sample in group["samples"]] == [0, 1, 2, 3]
    assert group["size"] == 4
