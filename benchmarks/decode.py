"""Decode benchmark: zooms and overviews of long videos with vz_ray, decord, torchcodec and a lower bound.

    make bench-decode                          # 20- and 60-minute files at 640x360 and 1920x1080
    make bench-decode ARGS="--minutes 20 --sizes 640x360 --clips 20"

All readers decode the same segments, each segment for the first time. Readers take turns, so that load on
the machine affects all of them. Times are wall and CPU seconds of this process, including its threads. The
last line is one JSON object. Ratios are other / vz_ray (above 1: vz_ray is faster), except
`ratio_vs_floor_*`, which are vz_ray / floor.

- vz_ray: `ClipReader` with the settings of the decode pool and two one-threaded decoders. Frame caches are
  off; the frame table is on disk.
- decord: as in the released VideoZoomer tool: opened for each call with 8 threads, `get_batch`, then PIL
  Lanczos to the same size. It is not frame-exact.
- torchcodec: exact mode, decoder kept open, one thread, the same frames, resized in its filter graph.
- floor: lower bound with PyAV: decodes only the required packets, skips non-reference frames, and scales
  each frame once. No planning, hashing or copy of arrays.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from benchmarks.synthetic_video import make_video
from vz_ray.video.clip_reader import ClipReader
from vz_ray.video.disk_cache import DiskCache
from vz_ray.video.frame import FrameSize, OverviewRequest, ZoomRequest
from vz_ray.video.frame_table import iter_packets
from vz_ray.video.video_reader import VideoReader

CLIP_S, CLIP_FPS, THREADS = 8.0, 2.0, 2
OVERVIEW = OverviewRequest(fps=0.5, max_frames=64)
SIZE = FrameSize(min_pixels=25_088, max_pixels=100_352, factor=28)


# -- readers ----------------------------------------------------------------


class VzRayReader:
    """vz_ray's reader with a cached frame table and without cached frames."""

    name = "vz_ray"

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.reader = ClipReader(cache_bytes=0, num_threads=THREADS)
        self.reader.probe(self.path)

    def zoom(self, start: float) -> int:
        return len(self.reader.clip(self.path, ZoomRequest(start, start + CLIP_S, CLIP_FPS), SIZE).frames)

    def overview(self) -> int:
        """Hash, scan and decode the file as in a new process with an empty cache."""
        clear_identity_cache()
        with tempfile.TemporaryDirectory() as folder:
            reader = ClipReader(cache_bytes=0, disk_cache=DiskCache(folder, 2**34), num_threads=THREADS)
            return len(reader.clip(self.path, OVERVIEW, SIZE).frames)


class DecordReader:
    """decord with the calls of the released tool; frame indices follow the average rate."""

    name = "decord"

    def __init__(self, path: Path) -> None:
        self.path, self.size = str(path), output_size(path)

    def zoom(self, start: float) -> int:
        return self._read(lambda fps, total: clip_indices(start, fps, total))

    def overview(self) -> int:
        return self._read(lambda _, total: [k * total // OVERVIEW.max_frames for k in range(64)])

    def _read(self, choose_indices: Callable[[float, int], list[int]]) -> int:
        import decord
        from PIL import Image

        video = decord.VideoReader(self.path, num_threads=8)
        frames = video.get_batch(choose_indices(video.get_avg_fps(), len(video))).asnumpy()
        return len([Image.fromarray(f).resize(self.size, Image.Resampling.LANCZOS) for f in frames])


class TorchCodecReader:
    """torchcodec in exact mode, kept open, with one thread and resizing in its filter graph."""

    name = "torchcodec"

    def __init__(self, path: Path) -> None:
        self.path, self.size = str(path), output_size(path)
        self.decoder = self._open()

    def _open(self) -> Any:
        from torchcodec.decoders import VideoDecoder
        from torchcodec.transforms import Resize

        width, height = self.size
        return VideoDecoder(
            self.path,
            seek_mode="exact",
            num_ffmpeg_threads=1,
            dimension_order="NHWC",
            transforms=[Resize((height, width))],
        )

    def zoom(self, start: float) -> int:
        times = [start + j / CLIP_FPS for j in range(int(CLIP_S * CLIP_FPS))]
        return len(self.decoder.get_frames_played_at(times))

    def overview(self) -> int:
        decoder = self._open()
        duration = decoder.metadata.duration_seconds
        return len(decoder.get_frames_played_at([k * duration / 64 for k in range(64)]))


class FloorReader:
    """Lower bound of any reader on this decoder."""

    name = "floor"

    def __init__(self, path: Path) -> None:
        with VideoReader(str(path)) as reader:
            self.table = reader.table
        self.size, self.scaler = output_size(path), VideoReformatter()
        self.container = av.open(str(path))
        self.stream = self.container.streams.video[0]
        self.stream.codec_context.thread_count = 1

    def zoom(self, start: float) -> int:
        return self._decode([start + j / CLIP_FPS for j in range(int(CLIP_S * CLIP_FPS))])

    def overview(self) -> int:
        duration = self.table.duration_s
        return sum(self._decode([k * duration / 64]) for k in range(64))

    def _decode(self, times: Sequence[float]) -> int:
        wanted = {self.table.pts_at(second) for second in times}
        missing, context = len(wanted), self.stream.codec_context
        key = self.table.keyframe_before(min(wanted))
        self.container.seek(int(self.table.keyframe_pts[key]), stream=self.stream)
        for packet in iter_packets(self.container, self.stream):
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            for frame in packet.decode():
                if frame.pts in wanted:
                    self._scale(frame)
                    missing -= 1
            if not missing:
                break
        return len(wanted) - missing

    def _scale(self, frame: av.VideoFrame) -> None:
        flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
        self.scaler.reformat(
            frame,
            width=self.size[0],
            height=self.size[1],
            format="rgb24",
            interpolation=flags,
            dst_color_range=ColorRange.JPEG,
            threads=1,
        )


def output_size(path: Path) -> tuple[int, int]:
    with VideoReader(str(path)) as reader:
        return reader.target_size(SIZE)


def clip_indices(start: float, fps: float, total: int) -> list[int]:
    count = int(CLIP_S * CLIP_FPS)
    return [min(total - 1, int((start + j / CLIP_FPS) * fps)) for j in range(count)]


def clear_identity_cache() -> None:
    from vz_ray.video import video_file

    video_file.hash_file.cache_clear()


def open_readers(path: Path) -> tuple[list[Any], dict[str, str]]:
    """Return the readers that are available, and the error of each of the others."""
    readers, missing = [], {}
    for reader_type in (VzRayReader, DecordReader, TorchCodecReader, FloorReader):
        try:
            reader = reader_type(path)
            reader.zoom(1.0)
            readers.append(reader)
        except (ImportError, RuntimeError, OSError) as error:
            missing[reader_type.name] = str(error).strip().splitlines()[0][:200]
    return readers, missing


# -- measurements -----------------------------------------------------------


@dataclass
class CallTimes:
    """Milliseconds of each call."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def call(self, work: Callable[[], int], num_frames: int) -> None:
        """Time one call, which must return `num_frames`."""
        wall_started, cpu_started = time.perf_counter(), cpu_seconds()
        count = work()
        self.wall.append((time.perf_counter() - wall_started) * 1e3)
        self.cpu.append((cpu_seconds() - cpu_started) * 1e3)
        if count != num_frames:
            raise RuntimeError(f"decoded {count} frames; expected {num_frames}")

    def to_dict(self) -> dict[str, Any]:
        quartiles = statistics.quantiles(self.wall, n=4) if len(self.wall) > 1 else [self.wall[0]] * 3
        return {
            "ms_median": round(statistics.median(self.wall), 2),
            "ms_quartiles": [round(quartiles[0], 2), round(quartiles[2], 2)],
            "cpu_ms_median": round(statistics.median(self.cpu), 2),
        }


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure_file(path: Path, minutes: int, num_clips: int, num_overviews: int) -> dict[str, Any]:
    """Measure all readers on one file; the reader that starts rotates."""
    readers, missing = open_readers(path)
    rng = random.Random(str(path.name))
    starts = [rng.uniform(0, minutes * 60 - CLIP_S) for _ in range(num_clips)]
    zooms = {reader.name: CallTimes() for reader in readers}
    overviews = {reader.name: CallTimes() for reader in readers}
    for turn, start in enumerate(starts):
        for reader in rotate(readers, turn):
            zooms[reader.name].call(lambda reader=reader, start=start: reader.zoom(start), 16)
    for turn in range(num_overviews):
        for reader in rotate(readers, turn):
            overviews[reader.name].call(reader.overview, 64)
    cached_ms, read_ms = time_cached_overview(path)
    return {
        "file_mb": round(path.stat().st_size / 1e6, 1),
        "missing": missing,
        "zoom": {name: times.to_dict() for name, times in zooms.items()},
        "overview": {name: times.to_dict() for name, times in overviews.items()},
        "overview_ms_cached": round(cached_ms, 2),
        "overview_cached_over_read": round(cached_ms / read_ms, 2),
        **time_ratios(zooms, overviews),
    }


def rotate(items: list[Any], offset: int) -> list[Any]:
    offset %= len(items)
    return items[offset:] + items[:offset]


def time_ratios(zooms: dict[str, CallTimes], overviews: dict[str, CallTimes]) -> dict[str, float]:
    """Return the median ratios of paired calls; readers that are missing have no ratio."""

    def ratio(times: dict[str, CallTimes], reader: str, base: str, clock: str = "wall") -> float | None:
        if reader not in times or base not in times:
            return None
        pairs = zip(getattr(times[reader], clock), getattr(times[base], clock), strict=True)
        return round(statistics.median(x / y for x, y in pairs), 2)

    ratios = {
        "ratio_vs_decord_zoom": ratio(zooms, "decord", "vz_ray"),
        "cpu_ratio_vs_decord_zoom": ratio(zooms, "decord", "vz_ray", "cpu"),
        "ratio_vs_decord_overview": ratio(overviews, "decord", "vz_ray"),
        "ratio_vs_torchcodec_zoom": ratio(zooms, "torchcodec", "vz_ray"),
        "ratio_vs_torchcodec_overview": ratio(overviews, "torchcodec", "vz_ray"),
        "ratio_vs_floor_zoom": ratio(zooms, "vz_ray", "floor"),
        "ratio_vs_floor_overview": ratio(overviews, "vz_ray", "floor"),
    }
    return {name: value for name, value in ratios.items() if value is not None}


def time_cached_overview(path: Path, repeats: int = 9) -> tuple[float, float]:
    """Return median milliseconds of an overview from the disk cache, and of reading the same files."""
    cached_ms, read_ms = [], []
    with tempfile.TemporaryDirectory() as folder:
        cache = DiskCache(folder, 2**34)
        ClipReader(cache_bytes=0, disk_cache=cache).clip(str(path), OVERVIEW, SIZE)
        files = [p for p in Path(folder).rglob("*") if p.is_file() and p.stat().st_size > 100_000]
        for _ in range(repeats):
            started = time.perf_counter()
            ClipReader(cache_bytes=0, disk_cache=cache).clip(str(path), OVERVIEW, SIZE)
            cached_ms.append((time.perf_counter() - started) * 1e3)
            started = time.perf_counter()
            contents = [file.read_bytes() for file in files]  # all in memory at the end, as in an overview
            read_ms.append((time.perf_counter() - started) * 1e3)
            del contents
    return statistics.median(cached_ms), statistics.median(read_ms)


def measure_memory_growth(path: Path, minutes: int, num_clips: int) -> dict[str, float]:
    """Return the growth of this process's memory over many clips, after a warm-up of a tenth of them."""
    reader, rng = ClipReader(cache_bytes=64 * 2**20), random.Random(1)
    rss_after_warm_up = 0.0
    for number in range(num_clips):
        if number == num_clips // 10:
            rss_after_warm_up = rss_mb()
        start = rng.uniform(0, minutes * 60 - 2)
        reader.clip(str(path), ZoomRequest(start, start + 2, 2.0), SIZE)
    growth = rss_mb() - rss_after_warm_up
    return {"clips": num_clips, "rss_mb": round(rss_mb(), 1), "rss_growth_mb": round(growth, 1)}


def rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure_pool(path: Path, minutes: int, num_episodes: int = 64, zooms: int = 4) -> dict[str, float]:
    """Measure throughput and wait times of the decode pool with concurrent episodes over eight videos."""
    import asyncio

    import ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    from vz_ray.config.clips import ClipsConfig
    from vz_ray.decode import DecodePool
    from vz_ray.decode.admission import request_owner

    folder = tempfile.mkdtemp(prefix="vz_ray_")
    videos = [Path(folder) / f"{number}.mp4" for number in range(8)]
    for video in videos:
        video.symlink_to(path.resolve())
    ray.init(address="local", num_cpus=4, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
    rng = random.Random(2)
    waits: list[float] = []

    async def run_all() -> dict[str, float]:
        config = ClipsConfig(
            num_actors=os.cpu_count() or 1,
            cpus_per_actor=0,
            memory_cache_mib=0,
            disk_cache_gib=0,
            max_in_flight_mib=64,
        )
        pool = DecodePool.start(config)
        await pool.wait_until_ready()
        await asyncio.gather(*(pool.probe(str(video)) for video in videos))

        async def run_episode(number: int) -> None:
            with request_owner(f"episode {number}"):
                for _ in range(zooms):
                    start, requested = rng.uniform(0, minutes * 60 - CLIP_S), time.perf_counter()
                    request = ZoomRequest(start, start + CLIP_S, CLIP_FPS)
                    await pool.clip(str(videos[number % 8]), request, SIZE)
                    waits.append(time.perf_counter() - requested)

        started = time.perf_counter()
        await asyncio.gather(*(run_episode(number) for number in range(num_episodes)))
        seconds, stats = time.perf_counter() - started, await pool.stats()
        median_wait = statistics.median(waits)
        return {
            "pool_clips_per_second": round(len(waits) / seconds, 2),
            "pool_wait_seconds_median": round(median_wait, 2),
            "pool_wait_max_over_median": round(max(waits) / median_wait, 2),
            "pool_in_flight_peak_mib": round(stats.peak_in_flight_bytes / 2**20, 1),
            "pool_in_flight_max_mib": config.max_in_flight_mib,
        }

    try:
        return asyncio.run(run_all())
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("data/bench"), help="folder of the test videos")
    parser.add_argument("--minutes", type=int, nargs="+", default=[20, 60])
    parser.add_argument("--sizes", nargs="+", default=["640x360", "1920x1080"])
    parser.add_argument("--clips", type=int, default=40, help="zooms per file")
    parser.add_argument("--overviews", type=int, default=3, help="overviews per file")
    parser.add_argument("--soak", type=int, default=5000, help="clips of the memory growth test")
    parser.add_argument("--pool-zooms", type=int, default=4, help="zooms of each of the pool's 64 episodes")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)

    files: dict[str, dict[str, Any]] = {}
    for size in args.sizes:
        width, height = map(int, size.split("x"))
        for minutes in args.minutes:
            path = make_video(args.folder, width, height, minutes)
            print(f"{path.name} ...", flush=True)
            files[path.stem] = measure_file(path, minutes, args.clips, args.overviews)
            print(json.dumps(files[path.stem], indent=1), flush=True)
    max_minutes = max(args.minutes)
    longest_files = {name: result for name, result in files.items() if name.endswith(f"-{max_minutes}min")}
    width, height = map(int, args.sizes[0].split("x"))
    path = make_video(args.folder, width, height, max_minutes)
    result = {
        **worst_case(list(longest_files.values())),
        **measure_pool(path, max_minutes, zooms=args.pool_zooms),
        "rss_growth_mb": measure_memory_growth(path, max_minutes, args.soak)["rss_growth_mb"],
        "soak_clips": args.soak,
        "worst_of_files": list(longest_files),
        "files": files,
        "cpus": os.cpu_count(),
    }
    print(json.dumps(result))


def worst_case(results: list[dict[str, Any]]) -> dict[str, float]:
    """Return, for each metric, the value that is worst for vz_ray."""
    worst = {
        "zoom_ms_median": max(r["zoom"]["vz_ray"]["ms_median"] for r in results),
        "overview_ms_cold": max(r["overview"]["vz_ray"]["ms_median"] for r in results),
        "overview_ms_cached": max(r["overview_ms_cached"] for r in results),
        "overview_cached_over_read": max(r["overview_cached_over_read"] for r in results),
    }
    for name in results[0]:
        if "ratio_vs" in name:
            select = max if "floor" in name else min
            worst[name] = select(r[name] for r in results if name in r)
    return worst


if __name__ == "__main__":
    main()
