"""The served agent under load: requests a second, time to the first token and zoom, and beyond capacity.

    make bench-serve
    make bench-serve ARGS="--workload workloads.json --repeats 5"

A real server (Ray Serve, ingress, one agent with a real vLLM engine and its decoders) is asked by 1, 8 and 32
clients at once about long videos. What is said follows a script, so that every run has the same tokens and
zooms; each zoom looks where no request before it has looked, so that every clip is decoded.

The floor is the bare engine doing the same work: the same episodes on an engine and decoders of the same
kind, in one process, without HTTP, without Ray Serve, as many at a time. Both take turns. `ratio_vs_engine`
is ours / floor in requests a second with 32 clients that do not stream; the clients' own CPU is counted as
the server's, since they share its cores.

Then four times as many requests as the server has places for, working and waiting, come at once; three times,
to see whether memory goes on growing.

The last line is one JSON object; figures are medians over the repeats.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
from transformers import AutoTokenizer

from benchmarks.directive_agent import DirectiveAgent, DirectiveEngine
from benchmarks.synthetic_video import make_video
from benchmarks.workload import Workload
from vz_ray.config import load_config
from vz_ray.config.serve import ServeConfig
from vz_ray.decode import DecodePool
from vz_ray.env.chat_format import ChatFormat, PromptTemplate
from vz_ray.env.episode_runner import run_episode
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, SamplingParams
from vz_ray.serve.launch import running_server

MODEL = "assets/tiny-base"
VIDEOS, MINUTES, SIZE = 4, 20, (640, 360)
CLIENTS = (1, 8, 32)
REQUESTS = {1: 6, 8: 48, 32: 128}
MAX_CONCURRENT_REQUESTS, QUEUE_SIZE = 32, 64
SAMPLING = SamplingParams(temperature=0.0, max_tokens=4096)
TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request of the workload."""

    video: str
    question: str


@dataclass
class LoadResult:
    """What came of a run's requests: seconds by kind, and the status of each."""

    wall_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    first_zoom_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    tokens: int = 0

    @property
    def requests_per_s(self) -> float:
        return len(self.latencies_s) / self.wall_s


def directive_question(shape: dict[str, Any], draw: random.Random, until_s: float) -> str:
    """A question that tells the agent what to say."""
    said = []
    for tokens, frames in zip(shape["turn_tokens"], [*shape["clip_frames"], None], strict=True):
        said.append(f"{{think {max(1, tokens - 16)}}}")
        if frames is None:
            said.append("{answer A}")
        else:
            start = round(draw.uniform(0, until_s - frames / 2 - 1), 2)
            said.append(f"{{zoom {start} {start + frames / 2} 2}}")
    return "What is shown? " + " ".join(said)


def make_requests(workload: Workload, videos: Sequence[str], count: int, lap: int) -> list[BenchRequest]:
    """The requests of a run; those of different laps look at different places."""
    draw = random.Random(f"{lap}/{count}")
    shapes = [workload.episodes[(lap * 131 + k) % len(workload.episodes)] for k in range(count)]
    until = MINUTES * 60.0
    return [
        BenchRequest(videos[k % len(videos)], directive_question(shape, draw, until))
        for k, shape in enumerate(shapes)
    ]


async def send_request(
    client: httpx.AsyncClient, ask: BenchRequest, took: LoadResult, *, stream: bool
) -> None:
    """One request, as a client sees it."""
    parts = [{"type": "video_url", "video_url": {"url": ask.video}}, {"type": "text", "text": ask.question}]
    body = {"model": "zoomer", "messages": [{"role": "user", "content": parts}], "stream": stream}
    began, seen = time.monotonic(), {"token": 0.0, "zoom": 0.0}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        took.statuses[response.status_code] += 1
        if stream:
            async for line in response.aiter_lines():
                for kind, mark in (("token", '"reasoning_content"'), ("zoom", '"zoom":')):
                    if not seen[kind] and mark in line:
                        seen[kind] = time.monotonic() - began
        else:
            reply = json.loads(await response.aread())
            took.tokens += reply.get("usage", {}).get("completion_tokens", 0)
    if response.status_code == 200:
        took.latencies_s.append(time.monotonic() - began)
        took.first_token_s += [seen["token"]] if seen["token"] else []
        took.first_zoom_s += [seen["zoom"]] if seen["zoom"] else []


async def run_http_load(
    url: str, requests: Sequence[BenchRequest], clients: int, *, stream: bool = False
) -> LoadResult:
    """All requests, so many at a time."""
    took, waiting = LoadResult(), list(reversed(requests))
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:

        async def work() -> None:
            while waiting:
                await send_request(client, waiting.pop(), took, stream=stream)

        began = time.monotonic()
        await asyncio.gather(*(work() for _ in range(clients)))
        took.wall_s = time.monotonic() - began
    return took


@dataclass
class EngineFloor:
    """The engine and decoders alone."""

    engine: DirectiveEngine
    pool: DecodePool
    wire: ChatFormat
    config: ServeConfig

    async def run(self, requests: Sequence[BenchRequest], clients: int) -> LoadResult:
        took, waiting = LoadResult(), list(enumerate(requests))[::-1]

        async def work() -> None:
            while waiting:
                number, ask = waiting.pop()
                began = time.monotonic()
                played = await run_episode(
                    Task(str(number), ask.video, ask.question, ""),
                    self.engine,
                    self.pool,
                    self.wire,
                    self.config.episode,
                    episode_id=EpisodeId(0, str(number), 0),
                    sampling_params=SAMPLING,
                )
                assert played.status is EpisodeStatus.ANSWERED, played.error
                took.latencies_s.append(time.monotonic() - began)
                took.tokens += sum(len(turn.action.token_ids) for turn in played.turns)

        began = time.monotonic()
        await asyncio.gather(*(work() for _ in range(clients)))
        took.wall_s = time.monotonic() - began
        return took


async def start_floor(config: ServeConfig, logs: Path) -> EngineFloor:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    pool = DecodePool.start(config.clips)
    engine = await DirectiveEngine.start(
        MODEL, config.engine, name="floor", log_file=logs / "floor.log", training=False
    )
    await pool.wait_until_ready()
    wire = ChatFormat(tokenizer, PromptTemplate.load(config.episode.prompt))
    return EngineFloor(engine, pool, wire, config)  # type: ignore[arg-type]


def memory_mb(folder: str) -> float:
    """Resident memory of everything that the server's cluster runs, MB."""
    total = 0.0
    for process in psutil.process_iter(["memory_info", "cmdline", "name"]):
        if process.info["memory_info"] and process.is_running():
            parents = " ".join(process.info["cmdline"] or [])
            if process.info["name"].startswith("ray::Serve") or folder in parents:
                total += process.info["memory_info"].rss / 1e6
    return total


def percentile(values: Sequence[float], share: float) -> float:
    """`values` has so large a share below it."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


async def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    workload = Workload.load(given.workload)
    given.videos.mkdir(parents=True, exist_ok=True)
    videos = [str(make_video(given.videos, *SIZE, MINUTES + extra)) for extra in range(VIDEOS)]
    config = build_config(given, folder)
    async with running_server(config, DirectiveAgent) as serving:
        floor = await start_floor(config, folder)
        try:
            warm = make_requests(workload, videos, 16, -1)
            await run_http_load(serving.url, warm, 8)
            await floor.run(warm, 8)
            laps = [
                await run_lap(serving.url, floor, workload, videos, number) for number in range(given.repeats)
            ]
            overload = [
                await measure_overload(serving.url, workload, videos, k) for k in range(given.overloads)
            ]
        finally:
            await floor.engine.shutdown()
            floor.pool.close()
    return {**(summarize(laps) if laps else {}), **_worst(overload), "repeats": given.repeats}


async def run_lap(
    url: str, floor: EngineFloor, workload: Workload, videos: Sequence[str], number: int
) -> dict[str, LoadResult]:
    """Every run once; floor and server one after the other on the same requests."""
    found: dict[str, LoadResult] = {}
    for clients in CLIENTS:
        requests = make_requests(workload, videos, REQUESTS[clients], number)
        found[f"server {clients}"] = await run_http_load(url, requests, clients)
        found[f"floor {clients}"] = await floor.run(requests, clients)
        assert found[f"server {clients}"].tokens == found[f"floor {clients}"].tokens
        # Places of their own, since these clips have been decoded now.
        fresh = make_requests(workload, videos, REQUESTS[clients], 1000 + number)
        found[f"stream {clients}"] = await run_http_load(url, fresh, clients, stream=True)
        for name in ("server", "floor", "stream"):
            took = found[f"{name} {clients}"]
            print(
                f"{number} {name} {clients}: {took.requests_per_s:.2f} requests/s {dict(took.statuses)}",
                flush=True,
            )
    return found


async def measure_overload(
    url: str, workload: Workload, videos: Sequence[str], number: int
) -> dict[str, Any]:
    """Four times what the server can take on, at once."""
    count = 4 * (MAX_CONCURRENT_REQUESTS + QUEUE_SIZE)
    before = memory_mb("vz_ray_")
    took = await run_http_load(url, make_requests(workload, videos, count, 5000 + number), count)
    shed = took.statuses[503] + took.statuses[429]
    assert sum(took.statuses.values()) == count
    return {
        "shed_at_4x": round(shed / count, 3),
        "accepted_at_4x": took.statuses[200],
        "p99_ms_at_4x": round(1e3 * percentile(took.latencies_s, 0.99)),
        "errors_500": sum(n for status, n in took.statuses.items() if status >= 500 and status != 503),
        "memory_mb": [round(before), round(memory_mb("vz_ray_"))],
    }


def _worst(overloads: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first overload's figures, the worst of all where more is worse; memory before and after each."""
    if not overloads:
        return {}
    worst = {name: max(one[name] for one in overloads) for name in ("p99_ms_at_4x", "errors_500")}
    memory = [overloads[0]["memory_mb"][0], *(one["memory_mb"][1] for one in overloads)]
    return {**overloads[0], **worst, "memory_mb": memory}


def summarize(laps: Sequence[dict[str, LoadResult]]) -> dict[str, Any]:
    """Medians over the laps."""

    def median(name: str, of: Any) -> float:
        return statistics.median(of(lap[name]) for lap in laps)

    at_most = CLIENTS[-1]
    by_clients = {
        str(clients): {
            "requests_per_s": round(median(f"server {clients}", lambda t: t.per_s), 2),
            "ratio_vs_engine": round(
                statistics.median(
                    lap[f"server {clients}"].requests_per_s / lap[f"floor {clients}"].requests_per_s
                    for lap in laps
                ),
                3,
            ),
            "streamed_per_s": round(median(f"stream {clients}", lambda t: t.per_s), 2),
            "ttft_ms_p50": round(
                1e3 * median(f"stream {clients}", lambda t: percentile(t.first_token_s, 0.5))
            ),
            "first_zoom_ms_p50": round(
                1e3 * median(f"stream {clients}", lambda t: percentile(t.first_zoom_s, 0.5))
            ),
            "p50_ms": round(1e3 * median(f"server {clients}", lambda t: percentile(t.whole_s, 0.5))),
            "p99_ms": round(1e3 * median(f"server {clients}", lambda t: percentile(t.whole_s, 0.99))),
        }
        for clients in CLIENTS
    }
    return {**by_clients[str(at_most)], "clients": by_clients}


def build_config(given: argparse.Namespace, folder: Path) -> ServeConfig:
    config = load_config(
        ServeConfig,
        "conf/serve/tiny.yaml",
        [
            f"model={MODEL}",
            "port=0",
            f"log_dir={folder}/logs",
            f"files.directory={folder}/uploads",
            f"files.allowed_dirs=[{given.videos}]",
            "access.max_requests_per_key=10000",
            f"max_ongoing_requests={MAX_CONCURRENT_REQUESTS}",
            f"queue={QUEUE_SIZE}",
            "engine.num_threads=1",
        ],
    )
    rules = replace(
        config.episode, max_context=4096, max_turn_tokens=1024, max_zoom_frames=16, max_images=128
    )
    return replace(config, episode=rules, clips=replace(config.clips, disk_cache_gib=0, threads_per_actor=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", type=Path, default=None, help="JSON file of episodes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--overloads", type=int, default=3, help="one after the other, for the memory")
    parser.add_argument(
        "--videos", type=Path, default=Path(tempfile.gettempdir()) / "vz_ray_bench", help="kept between runs"
    )
    given = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with tempfile.TemporaryDirectory(prefix="vz_ray_") as folder:
        found = asyncio.run(measure(given, Path(folder)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
