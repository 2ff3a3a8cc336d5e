"""Frames and facts on disk: whole or absent, shared by processes, bounded, and never a reason to fail."""

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

SIZE = FrameSize(min_pixels=28 * 28, max_pixels=56 * 56)
LOOK = OverviewRequest(fps=2, max_frames=16)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_video(tmp_path_factory.mktemp("video"), VideoSpec("video.mp4")))


def reader(root: Path, most: int = 2**30, memory: int = 0) -> ClipReader:
    return ClipReader(cache_bytes=memory, disk_cache=DiskCache(root, most))


def test_an_entry_comes_back_as_it_was_written(tmp_path: Path) -> None:
    store = DiskCache(tmp_path / "new", 2**20)
    assert store.get("aa11") is None
    assert store.put("aa11", b"one", b"two")
    found = store.get("aa11")
    assert found is not None
    assert found.tobytes() == b"onetwo"


def test_the_least_recently_used_are_dropped(tmp_path: Path) -> None:
    store = DiskCache(tmp_path, 16_000)
    for index in range(14):
        store.put(f"{index:02x}", bytes(1000))
        os.utime(tmp_path / f"{index:02x}" / f"{index:02x}", (index, index))
    assert store.get("00") is not None  # used now, so no longer the oldest
    for index in range(14, 18):
        store.put(f"{index:02x}", bytes(1000))
    assert store.get("00") is not None
    assert store.get("01") is None
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) <= 16_000 * 17 / 16
    assert store.evicted_entries > 0


def test_a_process_that_starts_looks_through_the_cache_only_if_nobody_did_lately(tmp_path: Path) -> None:
    assert DiskCache(tmp_path, 2**20).put("aa", b"one")
    left = tmp_path / "aa" / "bb.1-1.part"
    left.write_bytes(b"by a process that died")
    os.utime(left, (1, 1))
    assert DiskCache(tmp_path, 2**20).put("ab", b"two")
    assert left.exists()
    os.utime(tmp_path / "sweep.lock", (1, 1))
    assert DiskCache(tmp_path, 2**20).put("ac", b"three")
    assert not left.exists()


def test_a_second_process_decodes_and_scans_nothing(video: str, tmp_path: Path) -> None:
    first = reader(tmp_path)
    shown = first.overview(video, LOOK, SIZE)
    again = reader(tmp_path)
    same = again.overview(video, LOOK, SIZE)
    assert [frame.ref for frame in same.frames] == [frame.ref for frame in shown.frames]
    assert all(np.array_equal(a.rgb, b.rgb) for a, b in zip(same.frames, shown.frames, strict=True))
    stats = again.stats()
    assert (stats.scanned_videos, stats.decoded_frames, stats.seeks, stats.misses) == (0, 0, 0, 0)
    assert stats.disk_hits == len(shown.frames)
    assert again.resolve([frame.ref for frame in shown.frames])[0].ref == shown.frames[0].ref
    with pytest.raises(ValueError, match="read-only"):
        same.frames[0].rgb[0, 0, 0] = 1


def test_what_was_known_of_a_file_serves_for_other_clips_and_copies(video: str, tmp_path: Path) -> None:
    reader(tmp_path / "cache").overview(video, LOOK, SIZE)
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(Path(video).read_bytes())
    known, fresh = reader(tmp_path / "cache"), ClipReader()
    clip = known.zoom(str(copy), ZoomRequest(3, 5, fps=8), SIZE)
    assert known.stats().scanned_videos == 0
    assert [frame.ref for frame in clip.frames] == [
        frame.ref for frame in fresh.zoom(str(copy), ZoomRequest(3, 5, fps=8), SIZE).frames
    ]


def test_damaged_entries_are_made_again(video: str, tmp_path: Path) -> None:
    shown = reader(tmp_path).overview(video, LOOK, SIZE)
    draw = np.random.default_rng(0)
    for path in [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]:
        content = bytearray(path.read_bytes())
        match draw.integers(3):
            case 0:
                content[draw.integers(len(content))] ^= 1 << draw.integers(8)
            case 1:
                content = content[: draw.integers(len(content))]
            case _:
                content += b"more"
        path.write_bytes(content)
    store = DiskCache(tmp_path, 2**30)
    again = ClipReader(cache_bytes=0, disk_cache=store)
    assert [f.ref for f in again.overview(video, LOOK, SIZE).frames] == [f.ref for f in shown.frames]
    assert store.corrupt_entries == len(shown.frames) + 2  # the frames, the identity, the facts
    assert reader(tmp_path).overview(video, LOOK, SIZE).refs == shown.refs


@pytest.mark.parametrize("trouble", ["no permission", "a file in its place"])
def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    video: str, tmp_path: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "cache"
    if trouble == "a file in its place":
        root.write_text("")
    else:  # tests may run as root, who may write everywhere
        monkeypatch.setattr(os, "makedirs", refuse)
    store = DiskCache(root, 2**30)
    clip = ClipReader(disk_cache=store).overview(video, LOOK, SIZE)
    assert clip.refs == ClipReader().overview(video, LOOK, SIZE).refs
    assert store.failed_writes > 0


def test_a_full_disk_makes_room_and_is_left_alone_for_a_while(tmp_path: Path) -> None:
    store = DiskCache(tmp_path, 10_000)
    assert store.put("0a", bytes(8_000))
    (tmp_path / "0b").mkdir()
    part = tmp_path / "0b" / f"0b.{os.getpid()}-{threading.get_ident()}.part"
    part.symlink_to("/dev/full")  # every write to it fails as on a full disk
    assert not store.put("0b", bytes(1_000_000))
    assert store.failed_writes == 1
    assert not part.exists()
    assert store.get("0a") is None
    assert not store.put("0c", b"more")
    assert not (tmp_path / "0c").exists()


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


def fill(root: str, video: str, answers: multiprocessing.Queue[list[str]]) -> None:
    made = reader(Path(root), most=200_000)
    digests = []
    for _ in range(5):
        for start in range(0, 10, 2):
            digests += [
                f.ref.digest for f in made.zoom(video, ZoomRequest(start, start + 2, fps=8), SIZE).frames
            ]
    answers.put(digests)


def test_processes_that_fill_and_sweep_one_cache_all_get_the_right_frames(video: str, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[list[str]] = spawn.Queue()
    workers = [spawn.Process(target=fill, args=(str(tmp_path), video, answers)) for _ in range(3)]
    for worker in workers:
        worker.start()
    digests = [answers.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(30)
    plain = ClipReader()
    expected = [
        f.ref.digest
        for _ in range(5)
        for start in range(0, 10, 2)
        for f in plain.zoom(video, ZoomRequest(start, start + 2, fps=8), SIZE).frames
    ]
    assert digests == [expected] * 3
    assert not list(tmp_path.rglob("*.part"))
