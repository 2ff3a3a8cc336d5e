"""Episode viewer benchmark: index time, reopen time and query times of a run with many episodes.

    python -m benchmarks.episode_viewer --episodes 100000

The episodes have no videos; each has the size of a quickstart episode (16 overview
frames, 40 tokens per turn, about 5 kB). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.report.viewer.run_factory import write_light_run
from vz_ray.report.viewer.index_queries import EpisodeFilter
from vz_ray.report.viewer.viewer_session import ViewerSession

REPEATS = 30


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Return wall and CPU seconds of a call."""
    wall_started, cpu_started = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall_started, time.process_time() - cpu_started


def viewer_queries(session: ViewerSession, episodes: int) -> dict[str, Callable[[int], object]]:
    """Return the queries of the page by name; each takes the number of the repeat."""
    no_filter, count_filter = EpisodeFilter(), EpisodeFilter(stage="train", kind="count", zooms=1)
    return {
        "page": lambda k: session.page(no_filter, "newest", False, 60 * k, 60),
        "page_in_the_middle": lambda k: session.page(no_filter, "newest", False, episodes // 2 + 60 * k, 60),
        "page_by_reward": lambda k: session.page(no_filter, "reward", False, 60 * k, 60),
        "page_filtered": lambda k: session.page(count_filter, "newest", False, 60 * k, 60),
        "page_searched": lambda k: session.page(EpisodeFilter(text=f"border {k}7"), "newest", False, 0, 60),
        "charts": lambda k: session.charts(no_filter),
        "choices": lambda k: session.filter_options(),
        "state": lambda k: session.state(),
        "neighbours": lambda k: session.neighbours(no_filter, "reward", False, 1 + k),
        "episode": lambda k: session.episode(1 + k * episodes // REPEATS),
        "group": lambda k: session.group(1 + k * episodes // REPEATS),
    }


def measure_viewer(run: Path, index: Path, episodes: int) -> dict[str, float]:
    results: dict[str, float] = {"log_mb": sum(log.stat().st_size for log in run.glob("episodes/*")) / 1e6}
    session = ViewerSession(run, index)
    results["index_seconds"], results["index_cpu_seconds"] = timed(session.follower.catch_up)
    results["index_mb"] = index.stat().st_size / 1e6
    session.close()
    session = ViewerSession(run, index)
    results["reopen_seconds"], _ = timed(session.follower.catch_up)
    for name, query in viewer_queries(session, episodes).items():
        times = [timed(lambda k=k, query=query: query(k)) for k in range(REPEATS)]  # type: ignore[misc]
        results[f"{name}_ms"] = 1e3 * statistics.median(wall for wall, _ in times)
        results[f"{name}_cpu_ms"] = 1e3 * statistics.median(cpu for _, cpu in times)
    session.close()
    return {name: round(value, 3) for name, value in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = write_light_run(Path(folder) / "run", args.episodes)
        print(json.dumps(measure_viewer(run, Path(folder) / "index.sqlite", args.episodes)))


if __name__ == "__main__":
    main()
