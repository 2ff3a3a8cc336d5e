"""What the episode browser costs on a run of many episodes: its index, opening it again, every question.

    python -m benchmarks.episode_viewer --episodes 100000

The episodes have no videos; each is as long as a quickstart's (16 overview
frames, 40 tokens a turn, about 5 kB). Prints one JSON object as its last line.
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
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def viewer_queries(session: ViewerSession, episodes: int) -> dict[str, Callable[[int], object]]:
    """What a page asks, by name; each is called with the number of the repeat."""
    everything, some = EpisodeFilter(), EpisodeFilter(stage="train", kind="count", zooms=1)
    return {
        "page": lambda k: session.page(everything, "newest", False, 60 * k, 60),
        "page_in_the_middle": lambda k: session.page(everything, "newest", False, episodes // 2 + 60 * k, 60),
        "page_by_reward": lambda k: session.page(everything, "reward", False, 60 * k, 60),
        "page_filtered": lambda k: session.page(some, "newest", False, 60 * k, 60),
        "page_searched": lambda k: session.page(EpisodeFilter(text=f"border {k}7"), "newest", False, 0, 60),
        "charts": lambda k: session.charts(everything),
        "choices": lambda k: session.filter_options(),
        "state": lambda k: session.state(),
        "neighbours": lambda k: session.neighbours(everything, "reward", False, 1 + k),
        "episode": lambda k: session.episode(1 + k * episodes // REPEATS),
        "group": lambda k: session.group(1 + k * episodes // REPEATS),
    }


def measure_viewer(run: Path, index: Path, episodes: int) -> dict[str, float]:
    found: dict[str, float] = {"log_mb": sum(log.stat().st_size for log in run.glob("episodes/*")) / 1e6}
    session = ViewerSession(run, index)
    found["index_s"], found["index_cpu_s"] = timed(session.follower.catch_up)
    found["index_mb"] = index.stat().st_size / 1e6
    session.close()
    session = ViewerSession(run, index)
    found["reopen_s"], _ = timed(session.follower.catch_up)
    for name, ask in viewer_queries(session, episodes).items():
        times = [timed(lambda k=k, ask=ask: ask(k)) for k in range(REPEATS)]  # type: ignore[misc]
        found[f"{name}_ms"] = 1e3 * statistics.median(wall for wall, _ in times)
        found[f"{name}_cpu_ms"] = 1e3 * statistics.median(cpu for _, cpu in times)
    session.close()
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=100_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = write_light_run(Path(folder) / "run", asked.episodes)
        print(json.dumps(measure_viewer(run, Path(folder) / "index.sqlite", asked.episodes)))


if __name__ == "__main__":
    main()
