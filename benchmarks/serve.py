"""Load benchmark of the served agent: throughput, latency and behavior above capacity.

    make bench-serve
    make bench-serve ARGS="--workload workloads.json --repeats 5"

A real server (Ray Serve, ingress, one agent with a vLLM engine and its decoders) answers questions about long
videos from 1, 8 and 32 concurrent clients. The questions contain directives (see `benchmarks.directive_agent`),
so that every run has the same tokens and zooms. Each zoom requests a segment that no earlier request has used,
so that every clip is decoded.

The baseline runs the same episodes on the same kind of engine and decoders in one process, without HTTP and Ray
Serve, at the same concurrency. Server and baseline alternate. `ratio_vs_engine` is the server's throughput
divided by the baseline's, with 32 clients that do not stream. The clients share the server's cores, so the
server's figures include their CPU time.

The overload test sends four times the server's capacity (running and queued requests) at once. It is repeated
three times to detect memory growth.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.directive_agent import DirectiveAgent, DirectiveEngine
from benchmarks.synthetic_video import make_video
from benchmarks.workload import Workload
from vz_ray.config import load_config
from vz_ray.config.serve import ServeConfig
from vz_ray.data.chat_format_loader import load_chat_format
from vz_ray.decode import DecodePool
from vz_ray.env.chat_format import ChatFormat
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
    """Latencies and HTTP statuses of the requests of one run.

    Attributes:
        first_token_seconds: Time to the first token of each streamed request.
        first_zoom_seconds: Time to the first zoom event of each streamed request with a zoom.
        tokens: Number of generated tokens.
    """

    wall_seconds: float = 0.0
    latency_seconds: list[float] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)
    first_zoom_seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    tokens: int = 0

    @property
    def requests_per_second(self) -> float:
        return len(self.latency_seconds) / self.wall_seconds


def directive_question(shape: dict[str, Any], rng: random.Random, duration_s: float) -> str:
    """Return a question with directives for an episode of this shape, with random zoom segments."""
    directives = []
    for tokens, frames in zip(shape["turn_tokens"], [*shape["clip_frames"], None], strict=True):
        directives.append(f"{{think {max(1, tokens - 16)}}}")
        if frames is None:
            directives.append("{answer A}")
        else:
            start_s = round(rng.uniform(0, duration_s - frames / 2 - 1), 2)
            directives.append(f"{{zoom {start_s} {start_s + frames / 2} 2}}")
    return "What is shown? " + " ".join(directives)


def make_requests(workload: Workload, videos: Sequence[str], count: int, seed: int) -> list[BenchRequest]:
    """Return the requests of a run; another seed gives other zoom segments."""
    rng = random.Random(f"{seed}/{count}")
    shapes = [workload.episodes[(seed * 131 + i) % len(workload.episodes)] for i in range(count)]
    return [
        BenchRequest(videos[i % len(videos)], directive_question(shape, rng, MINUTES * 60.0))
        for i, shape in enumerate(shapes)
    ]


async def send_request(client: httpx.AsyncClient, request: BenchRequest, result: LoadResult, *, stream: bool) -> None:
    """Send one request and record its latencies and status in `result`."""
    content = [
        {"type": "video_url", "video_url": {"url": request.video}},
        {"type": "text", "text": request.question},
    ]
    body = {"model": "zoomer", "messages": [{"role": "user", "content": content}], "stream": stream}
    started = time.monotonic()
    first_seconds: dict[str, float] = {}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        result.statuses[response.status_code] += 1
        if stream:
            async for line in response.aiter_lines():
                for event, field_name in (("token", '"reasoning_content"'), ("zoom", '"zoom":')):
                    if event not in first_seconds and field_name in line:
                        first_seconds[event] = time.monotonic() - started
        else:
            reply = json.loads(await response.aread())
            result.tokens += reply.get("usage", {}).get("completion_tokens", 0)
    if response.status_code == 200:
        result.latency_seconds.append(time.monotonic() - started)
        if "token" in first_seconds:
            result.first_token_seconds.append(first_seconds["token"])
        if "zoom" in first_seconds:
            result.first_zoom_seconds.append(first_seconds["zoom"])


async def run_http_load(
    url: str, requests: Sequence[BenchRequest], clients: int, *, stream: bool = False
) -> LoadResult:
    """Send all requests to the server from `clients` concurrent clients."""
    result, pending = LoadResult(), list(reversed(requests))
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:

        async def run_client() -> None:
            while pending:
                await send_request(client, pending.pop(), result, stream=stream)

        started = time.monotonic()
        await asyncio.gather(*(run_client() for _ in range(clients)))
        result.wall_seconds = time.monotonic() - started
    return result


@dataclass
class EngineBaseline:
    """Engine and decoders in this process, without a server."""

    engine: DirectiveEngine
    decode_pool: DecodePool
    chat_format: ChatFormat
    config: ServeConfig

    async def run(self, requests: Sequence[BenchRequest], clients: int) -> LoadResult:
        """Run the episodes of all requests, `clients` at a time."""
        result, pending = LoadResult(), list(enumerate(requests))[::-1]

        async def run_client() -> None:
            while pending:
                index, request = pending.pop()
                started = time.monotonic()
                trajectory = await run_episode(
                    Task(str(index), request.video, request.question, ""),
                    self.engine,
                    self.decode_pool,
                    self.chat_format,
                    self.config.episode,
                    episode_id=EpisodeId(0, str(index), 0),
                    sampling_params=SAMPLING,
                )
                assert trajectory.status is EpisodeStatus.ANSWERED, trajectory.error
                result.latency_seconds.append(time.monotonic() - started)
                result.tokens += sum(len(turn.action.token_ids) for turn in trajectory.turns)

        started = time.monotonic()
        await asyncio.gather(*(run_client() for _ in range(clients)))
        result.wall_seconds = time.monotonic() - started
        return result


async def start_baseline(config: ServeConfig, log_dir: Path) -> EngineBaseline:
    decode_pool = DecodePool.start(config.clips)
    engine = await DirectiveEngine.start(
        MODEL, config.engine, name="baseline", log_file=log_dir / "baseline.log", training=False
    )
    await decode_pool.wait_until_ready()
    chat_format = load_chat_format(MODEL, config.episode)
    return EngineBaseline(engine, decode_pool, chat_format, config)  # type: ignore[arg-type]


def cluster_memory_mb(folder: str) -> float:
    """Return the resident memory in MB of the Ray Serve processes and of processes started with `folder`."""
    total = 0.0
    for process in psutil.process_iter(["memory_info", "cmdline", "name"]):
        if process.info["memory_info"] and process.is_running():
            command = " ".join(process.info["cmdline"] or [])
            if process.info["name"].startswith("ray::Serve") or folder in command:
                total += process.info["memory_info"].rss / 1e6
    return total


def percentile(values: Sequence[float], fraction: float) -> float:
    """Return the smallest value that has at least `fraction` of all values below it, NaN without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] if ordered else float("nan")


async def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run server and baseline and return the summary."""
    workload = Workload.load(args.workload)
    args.videos.mkdir(parents=True, exist_ok=True)
    videos = [str(make_video(args.videos, *SIZE, MINUTES + extra)) for extra in range(VIDEOS)]
    config = build_config(args, folder)
    async with running_server(config, DirectiveAgent) as server:
        baseline = await start_baseline(config, folder)
        try:
            warmup_requests = make_requests(workload, videos, 16, -1)
            await run_http_load(server.url, warmup_requests, 8)
            await baseline.run(warmup_requests, 8)
            repeats = [await run_repeat(server.url, baseline, workload, videos, index) for index in range(args.repeats)]
            overloads = [await measure_overload(server.url, workload, videos, index) for index in range(args.overloads)]
        finally:
            await baseline.engine.shutdown()
            baseline.decode_pool.close()
    return {
        **(summarize(repeats) if repeats else {}),
        **summarize_overloads(overloads),
        "repeats": args.repeats,
    }


async def run_repeat(
    url: str, baseline: EngineBaseline, workload: Workload, videos: Sequence[str], index: int
) -> dict[str, LoadResult]:
    """Run server and baseline on the same requests, then the server with streaming, per number of clients."""
    results: dict[str, LoadResult] = {}
    for clients in CLIENTS:
        requests = make_requests(workload, videos, REQUESTS[clients], index)
        results[f"server {clients}"] = await run_http_load(url, requests, clients)
        results[f"baseline {clients}"] = await baseline.run(requests, clients)
        assert results[f"server {clients}"].tokens == results[f"baseline {clients}"].tokens
        # The clips of `requests` are cached now, so streaming needs other segments.
        stream_requests = make_requests(workload, videos, REQUESTS[clients], 1000 + index)
        results[f"stream {clients}"] = await run_http_load(url, stream_requests, clients, stream=True)
        for name in ("server", "baseline", "stream"):
            result = results[f"{name} {clients}"]
            rate = f"{result.requests_per_second:.2f} requests/s"
            print(f"{index} {name} {clients}: {rate} {dict(result.statuses)}", flush=True)
    return results


async def measure_overload(url: str, workload: Workload, videos: Sequence[str], index: int) -> dict[str, Any]:
    """Send four times the server's capacity at once."""
    count = 4 * (MAX_CONCURRENT_REQUESTS + QUEUE_SIZE)
    memory_before = cluster_memory_mb("vz_ray_")
    result = await run_http_load(url, make_requests(workload, videos, count, 5000 + index), count)
    rejected = result.statuses[503] + result.statuses[429]
    assert sum(result.statuses.values()) == count
    return {
        "rejected_at_4x": round(rejected / count, 3),
        "accepted_at_4x": result.statuses[200],
        "p99_ms_at_4x": round(1e3 * percentile(result.latency_seconds, 0.99)),
        "server_errors": sum(n for status, n in result.statuses.items() if status >= 500 and status != 503),
        "memory_mb": [round(memory_before), round(cluster_memory_mb("vz_ray_"))],
    }


def summarize_overloads(overloads: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the first overload's figures, with the maximum latency and errors and the memory after each."""
    if not overloads:
        return {}
    maxima = {name: max(figures[name] for figures in overloads) for name in ("p99_ms_at_4x", "server_errors")}
    memory_mb = [overloads[0]["memory_mb"][0], *(figures["memory_mb"][1] for figures in overloads)]
    return {**overloads[0], **maxima, "memory_mb": memory_mb}


def summarize(repeats: Sequence[dict[str, LoadResult]]) -> dict[str, Any]:
    """Return medians over the repeats, per number of clients; the largest number is also at the top level."""

    def median(name: str, figure: Callable[[LoadResult], float]) -> float:
        return statistics.median(figure(results[name]) for results in repeats)

    by_clients = {
        str(clients): {
            "requests_per_second": round(median(f"server {clients}", lambda r: r.requests_per_second), 2),
            "ratio_vs_engine": round(
                statistics.median(
                    results[f"server {clients}"].requests_per_second
                    / results[f"baseline {clients}"].requests_per_second
                    for results in repeats
                ),
                3,
            ),
            "streamed_requests_per_second": round(median(f"stream {clients}", lambda r: r.requests_per_second), 2),
            "ttft_ms_p50": round(1e3 * median(f"stream {clients}", lambda r: percentile(r.first_token_seconds, 0.5))),
            "first_zoom_ms_p50": round(
                1e3 * median(f"stream {clients}", lambda r: percentile(r.first_zoom_seconds, 0.5))
            ),
            "p50_ms": round(1e3 * median(f"server {clients}", lambda r: percentile(r.latency_seconds, 0.5))),
            "p99_ms": round(1e3 * median(f"server {clients}", lambda r: percentile(r.latency_seconds, 0.99))),
        }
        for clients in CLIENTS
    }
    return {**by_clients[str(CLIENTS[-1])], "clients": by_clients}


def build_config(args: argparse.Namespace, folder: Path) -> ServeConfig:
    """Return the config of the server; the baseline uses its episode, engine and decode settings."""
    config = load_config(
        ServeConfig,
        "conf/serve/tiny.yaml",
        [
            f"model={MODEL}",
            "port=0",
            f"log_dir={folder}/logs",
            f"files.directory={folder}/uploads",
            f"files.allowed_dirs=[{args.videos}]",
            "access.max_requests_per_key=10000",
            f"max_ongoing_requests={MAX_CONCURRENT_REQUESTS}",
            f"max_queued_requests={QUEUE_SIZE}",
            "engine.num_threads=1",
        ],
    )
    episode = replace(config.episode, max_context=4096, max_turn_tokens=1024, max_zoom_frames=16, max_images=128)
    clips = replace(config.clips, disk_cache_gib=0, threads_per_actor=1)
    return replace(config, episode=episode, clips=clips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, default=None, help="JSON file of episodes")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of the load test")
    parser.add_argument("--overloads", type=int, default=3, help="repeats of the overload test")
    parser.add_argument(
        "--videos",
        type=Path,
        default=Path(tempfile.gettempdir()) / "vz_ray_bench",
        help="directory of the videos, kept between runs",
    )
    args = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with tempfile.TemporaryDirectory(prefix="vz_ray_") as folder:
        summary = asyncio.run(measure(args, Path(folder)))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
