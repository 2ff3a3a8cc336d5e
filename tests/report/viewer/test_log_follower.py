"""Log follower and index: appended, invalid, replaced and deleted logs, and many lines."""

from __future__ import annotations

import os
import threading
import tracemalloc
from pathlib import Path

import pytest

from tests.report.viewer.conftest import Open
from tests.report.viewer.run_factory import LightEpisode, light_line, light_record, write_light_run
from vz_ray.report.viewer import log_follower
from vz_ray.report.viewer.episode_index import EpisodeIndex
from vz_ray.report.viewer.index_queries import MAX_ROWS, EpisodeFilter
from vz_ray.report.viewer.log_follower import LogFollower
from vz_ray.report.viewer.viewer_session import EpisodeNotFound, ViewerSession

SMALL = LightEpisode(frames=2, tokens=2)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_light_run(tmp_path / "small", 10, SMALL)


def append(run: Path, *lines: str, log: str = "episodes/000000.jsonl") -> None:
    with (run / log).open("a") as file:
        file.write("".join(lines))


def tasks(session: ViewerSession) -> list[tuple[str, int]]:
    rows = session.page(EpisodeFilter(), "newest", True, 0, MAX_ROWS)["rows"]
    return [(row["task"], row["sample"]) for row in rows]


def test_new_lines_are_added(small: Path, open_run: Open) -> None:
    session = open_run(small)
    before = session.page(EpisodeFilter(), "newest", True, 0, 100)["rows"]
    append(small, light_line(10, SMALL), light_line(11, SMALL))
    session.follower.catch_up()
    after = session.page(EpisodeFilter(), "newest", True, 0, 100)["rows"]
    assert (len(before), len(after)) == (10, 12)
    assert after[:10] == before


def test_revision_is_unchanged_without_new_lines(small: Path, open_run: Open) -> None:
    session = open_run(small)
    revision = session.index.revision
    session.follower.catch_up()
    assert session.index.revision == revision


def test_unterminated_last_line_is_read_later(small: Path, open_run: Open) -> None:
    line = light_line(10, SMALL)
    append(small, line[:100])
    session = open_run(small)
    assert session.state()["episodes"] == 10
    append(small, line[100:])
    session.follower.catch_up()
    assert (session.state()["episodes"], session.state()["skipped_lines"]) == (11, 0)


def test_invalid_line_is_skipped_and_reported(small: Path, open_run: Open) -> None:
    append(small, "{broken\n", light_line(10, SMALL))
    session = open_run(small)
    assert session.state()["episodes"] == 11
    assert session.skipped_lines() == {
        "count": 1,
        "lines": [
            {
                "file": "episodes/000000.jsonl",
                "line": 11,
                "reason": "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
            }
        ],
    }


def test_too_long_line_is_skipped(small: Path, open_run: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_follower, "MAX_LINE_BYTES", 4096)
    append(small, '{"a": "' + "x" * 20_000 + '"}\n', light_line(10, SMALL))
    session = open_run(small)
    assert session.state()["episodes"] == 11
    assert session.skipped_lines()["lines"][0]["reason"] == "20010 bytes; the maximum is 4096"
    append(small, light_line(11, SMALL))
    session.follower.catch_up()
    assert session.state()["episodes"] == 12


def test_replaced_log_is_read_again(small: Path, open_run: Open) -> None:
    session = open_run(small)
    old = session.page(EpisodeFilter(), "newest", True, 0, 1)["rows"][0]["id"]
    replacement = small / "new"
    replacement.write_text("".join(light_line(number, SMALL) for number in range(100, 140)))
    replacement.replace(small / "episodes" / "000000.jsonl")
    session.follower.catch_up()
    assert session.state()["episodes"] == 40
    with pytest.raises(EpisodeNotFound, match=f"no episode {old}: its log was deleted or replaced"):
        session.episode(old)


def test_overwritten_log_is_read_again(small: Path, open_run: Open) -> None:
    session = open_run(small)
    lines = "".join(light_line(number, SMALL) for number in range(100, 140))
    with (small / "episodes" / "000000.jsonl").open("r+") as file:
        file.write(lines)
        file.truncate()
    session.follower.catch_up()
    assert tasks(session)[0] == ("t12", 4)
    assert len(tasks(session)) == 40


def test_truncated_or_deleted_log_is_removed(small: Path, open_run: Open) -> None:
    append(small, *[light_line(number, SMALL) for number in range(20, 25)], log="episodes/000001.jsonl")
    session = open_run(small)
    assert session.state()["episodes"] == 15
    (small / "episodes" / "000001.jsonl").unlink()
    os.truncate(small / "episodes" / "000000.jsonl", len(light_line(0, SMALL).encode()))
    session.follower.catch_up()
    assert session.state()["episodes"] == 1


def test_new_logs_are_followed(small: Path, open_run: Open) -> None:
    session = open_run(small)
    (small / "eval").mkdir()
    append(small, '{"evaluation":{"stage":"rl"}}\n', light_line(50, SMALL), log="eval/rl.jsonl")
    session.follower.catch_up()
    assert (session.state()["episodes"], session.state()["skipped_lines"]) == (11, 0)


def test_changed_line_is_not_shown(small: Path, open_run: Open) -> None:
    session = open_run(small)
    first = session.page(EpisodeFilter(), "newest", True, 0, 1)["rows"][0]["id"]
    log = small / "episodes" / "000000.jsonl"
    log.write_text("".join(light_line(number, SMALL) for number in range(50, 70)))
    with pytest.raises(EpisodeNotFound, match=r"line 1 of episodes/000000\.jsonl has changed"):
        session.episode(first)


def test_two_viewers_share_an_index(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "shared.sqlite"
    followers = [LogFollower(small, EpisodeIndex(small, path)) for _ in range(2)]
    append(small, *[light_line(number, SMALL) for number in range(10, 400)])
    threads = [threading.Thread(target=follower.catch_up) for follower in followers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (count,) = followers[0].index.connection.execute("SELECT count(*) FROM episodes").fetchone()
    assert count == 400
    for follower in followers:
        follower.index.close()


def count_episodes(run: Path, index: Path) -> int:
    """Open a run with an index, read its logs, and return the number of episodes."""
    session = ViewerSession(run, index)
    session.follower.catch_up()
    count = session.state()["episodes"]
    session.close()
    return int(count)


@pytest.mark.parametrize("content", [b"", b"no database" * 100])
def test_damaged_index_is_rebuilt(small: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "index.sqlite"
    path.write_bytes(content)
    assert count_episodes(small, path) == 10


def test_index_of_another_version_is_rebuilt(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    old = EpisodeIndex(small, path)
    old.connection.execute("PRAGMA user_version = 999")
    old.connection.execute("DROP TABLE episodes")
    old.close()
    assert count_episodes(small, path) == 10


def test_index_is_temporary_without_a_cache_directory(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    session = ViewerSession(small, tmp_path / "file" / "index.sqlite")
    session.follower.catch_up()
    path = session.index.path
    assert session.state()["episodes"] == 10
    session.close()
    assert not path.exists()


# -- many episodes -------------------------------------------------------------------------

MANY = 100_000


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_light_run(tmp_path_factory.mktemp("many") / "many", MANY, SMALL)


@pytest.fixture(scope="module")
def large(many: Path) -> ViewerSession:
    session = ViewerSession(many, many.parent / "index.sqlite")
    session.follower.catch_up()
    return session


def bytes_read() -> int:
    """Return the bytes that this process has read, including from caches."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_100_000_episodes_are_listed_once_in_order(large: ViewerSession) -> None:
    assert large.state()["episodes"] == MANY
    assert large.state()["indexed"][0] == large.state()["indexed"][1]
    seen = 0
    for offset in (0, 40_000, MANY - 60):
        answer = large.page(EpisodeFilter(), "newest", False, offset, 60)
        ids = [row["id"] for row in answer["rows"]]
        assert ids == list(range(MANY - offset, MANY - offset - 60, -1))
        assert answer["total"] == MANY
        seen += len(ids)
    assert seen == 180
    assert large.page(EpisodeFilter(), "newest", False, MANY, 60)["rows"] == []


def test_filters_of_many_episodes_match_their_lines(large: ViewerSession) -> None:
    where = EpisodeFilter(kind="count", zooms=2, outcome="wrong", step_from=100, step_to=199)
    answer = large.page(where, "reward", True, 0, MAX_ROWS)
    expected = [number for number in range(2000) if _like(number)]
    repeats = [100 * 128 + k for k in range(100 * 128)]
    assert answer["total"] == sum((number % 2000) in set(expected) for number in repeats)
    assert all((row["kind"], row["zooms"], row["outcome"]) == ("count", 2, "wrong") for row in answer["rows"])
    rewards = [row["reward"] for row in answer["rows"]]
    assert rewards == sorted(rewards)


def _like(number: int) -> bool:
    record = light_record(number, SMALL)
    reward = record.trajectory.reward
    assert reward is not None
    return record.task.kind == "count" and len(record.trajectory.zooms) == 2 and reward.accuracy < 1


def test_request_over_many_episodes_is_cheap(large: ViewerSession, many: Path) -> None:
    size = sum(log.stat().st_size for log in many.glob("episodes/*"))
    tracemalloc.start()
    for ask in (
        lambda: large.page(EpisodeFilter(), "newest", False, 50_000, MAX_ROWS),
        lambda: large.page(EpisodeFilter(text="border 17"), "seconds", False, 0, MAX_ROWS),
        lambda: large.charts(EpisodeFilter()),
        lambda: large.filter_options(),
        lambda: large.episode(MANY // 2),
        lambda: large.group(MANY // 3),
        lambda: large.neighbours(EpisodeFilter(kind="count"), "reward", False, 77),
    ):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        ask()
        assert tracemalloc.get_traced_memory()[1] - before < 2 * 2**20
    tracemalloc.stop()
    before = bytes_read()
    large.episode(MANY // 2)
    assert bytes_read() - before < 1000 * 2**10 < size / 50


def test_reopened_index_reads_almost_nothing(large: ViewerSession, many: Path) -> None:
    before = bytes_read()
    again = ViewerSession(many, large.index.path)
    again.follower.catch_up()
    assert again.state()["episodes"] == MANY
    assert bytes_read() - before < 8 * 2**20
    again.close()


def test_chart_of_many_steps_has_bounded_points(large: ViewerSession) -> None:
    answer = large.charts(EpisodeFilter())
    (stage,) = answer["stages"]
    assert answer["width"] == 4
    assert len(stage["points"]) <= 240
    assert sum(point[-1] for point in stage["points"]) == MANY
    assert sum(one["count"] for one in answer["outcomes"]) == MANY


def test_indexing_holds_one_batch_in_memory(tmp_path: Path, open_run: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_follower, "BATCH_BYTES", 2**18)
    run = write_light_run(tmp_path / "batches", 4000, SMALL, per_file=4000)
    tracemalloc.start()
    session = open_run(run)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert session.state()["episodes"] == 4000
    assert peak < 8 * 2**20
    assert session.index.revision > 10
