"""Disk cache of frames and metadata: atomic, shared by processes, bounded, without I/O exceptions."""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.video.clip_reader import ClipReader
from vz_ray.video.disk_cache import DiskCache
from vz_ray.video.frame import FrameSize, OverviewRequest, ZoomRequest

SIZE = FrameSize(min_pixels=28 * 28, max_pixels=56 * 56, factor=28)
OVERVIEW = OverviewRequest(fps=2, max_frames=16)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_video(tmp_path_factory.mktemp("video"), VideoSpec("video.mp4")))


def make_reader(root: Path, max_bytes: int = 2**30) -> ClipReader:
    return ClipReader(cache_bytes=0, disk_cache=DiskCache(root, max_bytes))


def test_entry_is_read_back_unchanged(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "new", 2**20)
    assert cache.get("aa11") is None
    assert cache.put("aa11", b"one", b"two")
    entry = cache.get("aa11")
    assert entry is not None
    assert entry.tobytes() == b"onetwo"


def test_least_recently_used_entries_are_evicted(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 16_000)
    for index in range(14):
        cache.put(f"{index:02x}", bytes(1000))
        os.utime(tmp_path / f"{index:02x}" / f"{index:02x}", (index, index))
    assert cache.get("00") is not None  # marks the entry as recently used
    for index in range(14, 18):
        cache.put(f"{index:02x}", bytes(1000))
    assert cache.get("00") is not None
    assert cache.get("01") is None
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) <= 16_000 * 17 / 16


def test_new_process_scans_unless_one_did_recently(tmp_path: Path) -> None:
    assert DiskCache(tmp_path, 2**20).put("aa", b"one")
    stale_part = tmp_path / "aa" / "bb.1-1.part"
    stale_part.write_bytes(b"partial")
    os.utime(stale_part, (1, 1))
    assert DiskCache(tmp_path, 2**20).put("ab", b"two")
    assert stale_part.exists()
    os.utime(tmp_path / "eviction.lock", (1, 1))
    assert DiskCache(tmp_path, 2**20).put("ac", b"three")
    assert not stale_part.exists()


def test_second_reader_neither_decodes_nor_scans(video: str, tmp_path: Path) -> None:
    decoded = make_reader(tmp_path).clip(video, OVERVIEW, SIZE)
    second_reader = make_reader(tmp_path)
    cached = second_reader.clip(video, OVERVIEW, SIZE)
    assert [frame.ref for frame in cached.frames] == [frame.ref for frame in decoded.frames]
    assert all(np.array_equal(a.rgb, b.rgb) for a, b in zip(cached.frames, decoded.frames, strict=True))
    stats = second_reader.stats()
    assert (stats.scanned_videos, stats.decoded_frames, stats.seeks, stats.misses) == (0, 0, 0, 0)
    assert stats.disk_hits == len(decoded.frames)
    assert second_reader.resolve([frame.ref for frame in decoded.frames])[0].ref == decoded.frames[0].ref
    with pytest.raises(ValueError, match="read-only"):
        cached.frames[0].rgb[0, 0, 0] = 1


def test_metadata_is_reused_for_other_clips_and_copies(video: str, tmp_path: Path) -> None:
    make_reader(tmp_path / "cache").clip(video, OVERVIEW, SIZE)
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(Path(video).read_bytes())
    cached_reader, uncached_reader = make_reader(tmp_path / "cache"), ClipReader()
    clip = cached_reader.clip(str(copy), ZoomRequest(3, 5, fps=8), SIZE)
    assert cached_reader.stats().scanned_videos == 0
    assert clip.refs == uncached_reader.clip(str(copy), ZoomRequest(3, 5, fps=8), SIZE).refs


def test_corrupt_entries_are_replaced(video: str, tmp_path: Path) -> None:
    decoded = make_reader(tmp_path).clip(video, OVERVIEW, SIZE)
    rng = np.random.default_rng(0)
    for path in [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]:
        content = bytearray(path.read_bytes())
        match rng.integers(3):
            case 0:
                content[rng.integers(len(content))] ^= 1 << rng.integers(8)
            case 1:
                content = content[: rng.integers(len(content))]
            case _:
                content += b"more"
        path.write_bytes(content)
    cache = DiskCache(tmp_path, 2**30)
    reader = ClipReader(cache_bytes=0, disk_cache=cache)
    assert reader.clip(video, OVERVIEW, SIZE).refs == decoded.refs
    entries = [path.name for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(entries) == len(decoded.frames) + 2  # frames, content hash, metadata
    assert all(cache.get(name) is not None for name in entries)
    assert make_reader(tmp_path).clip(video, OVERVIEW, SIZE).refs == decoded.refs


@pytest.mark.parametrize("cause", ["no permission", "file instead of directory"])
def test_unwritable_cache_does_not_raise(
    video: str, tmp_path: Path, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "cache"
    if cause == "file instead of directory":
        root.write_text("")
    else:  # patched, because root ignores permissions
        monkeypatch.setattr(os, "makedirs", deny)
    cache = DiskCache(root, 2**30)
    clip = ClipReader(disk_cache=cache).clip(video, OVERVIEW, SIZE)
    assert clip.refs == ClipReader().clip(video, OVERVIEW, SIZE).refs
    assert not cache.put("00", b"pixels")


def test_full_disk_evicts_and_pauses_writes(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_000)
    assert cache.put("0a", bytes(8_000))
    (tmp_path / "0b").mkdir()
    part = tmp_path / "0b" / f"0b.{os.getpid()}-{threading.get_ident()}.part"
    part.symlink_to("/dev/full")  # every write fails with ENOSPC
    assert not cache.put("0b", bytes(1_000_000))
    assert not part.exists()
    assert cache.get("0a") is None
    assert not cache.put("0c", b"more")
    assert not (tmp_path / "0c").exists()


def deny(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


def read_clips(root: str, video: str, results: multiprocessing.Queue[list[str]]) -> None:
    reader = make_reader(Path(root), max_bytes=200_000)
    digests = []
    for _ in range(5):
        for start in range(0, 10, 2):
            digests += [f.ref.digest for f in reader.clip(video, ZoomRequest(start, start + 2, fps=8), SIZE).frames]
    results.put(digests)


def test_concurrent_processes_read_correct_frames(video: str, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[list[str]] = spawn.Queue()
    workers = [spawn.Process(target=read_clips, args=(str(tmp_path), video, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    digests = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(30)
    uncached_reader = ClipReader()
    expected = [
        f.ref.digest
        for _ in range(5)
        for start in range(0, 10, 2)
        for f in uncached_reader.clip(video, ZoomRequest(start, start + 2, fps=8), SIZE).frames
    ]
    assert digests == [expected] * 3
    assert not list(tmp_path.rglob("*.part"))
