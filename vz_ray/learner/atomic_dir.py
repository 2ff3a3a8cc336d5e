"""Directories that are complete or absent, and checked before anything is read from them.

    begin_draft --> files, by all ranks --> seal: hashes in a manifest, everything flushed, renamed

The manifest holds a hash of each file and of itself. That finds damage and stray edits; it is no
signature, and does not tell who wrote the directory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from vz_ray.learner.distributed import RankInfo, fail_together, reraise_on_all_ranks
from vz_ray.utils.atomic_files import sync_directory, write_atomic
from vz_ray.utils.errors import UserError

MANIFEST = "manifest.json"


class CheckpointError(UserError):
    """A checkpoint is incomplete, damaged, or of another model."""


def create_draft(directory: Path, place: RankInfo) -> Path:
    """An empty directory beside `directory`, to be filled and sealed; every rank must call.

    Raises:
        FileExistsError: `directory` is there already.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} exists, and is never written over: choose another directory")
    draft = directory.with_name(f".{directory.name}.draft")
    with fail_together(place, f"preparing {draft}"):
        if place.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
    return draft


def fsync_and_hash(path: Path) -> str:
    """Brings a file to disk; returns the hash of its bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return _hash(path)


def commit(
    draft: Path, final: Path, metadata: Mapping[str, Any], known_hashes: Mapping[str, str] | None = None
) -> None:
    """Flushes all files of `draft`, writes its manifest, and renames it to `final`.

    Args:
        metadata: What the manifest shall say besides hashes.
        known_hashes: Hashes by name of files that have been `flushed` already.
    """
    hashes = dict(known_hashes or {})
    for path in sorted(path for path in draft.rglob("*") if path.is_file()):
        name = str(path.relative_to(draft))
        if name not in hashes:
            hashes[name] = fsync_and_hash(path)
    content = {"facts": metadata, "files": hashes}
    write_atomic(draft / MANIFEST, json.dumps(content | {"seal": _seal(content)}, indent=1).encode())
    for folder in [draft, *(path for path in draft.rglob("*") if path.is_dir())]:
        sync_directory(folder)
    draft.rename(final)
    sync_directory(final.parent)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, whole: `facts` and `files`.

    Raises:
        CheckpointBroken: There is none, or it is not as it was written.
    """
    file = directory / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{directory} has no {MANIFEST}: no complete checkpoint was written there")
    try:
        content = json.loads(file.read_text())
        whole = content.pop("seal") == _seal(content)
    except (ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(
            f"{MANIFEST} of checkpoint {directory} is not as it was written: use another checkpoint"
        )
    return dict(content)


def verify_files(directory: Path, place: RankInfo) -> None:
    """Checks every file against its hash; the ranks share the files, and every rank must call.

    Raises:
        CheckpointBroken: No manifest, a file is missing, or its bytes are not those written; on all ranks.
    """
    with reraise_on_all_ranks(place, CheckpointError):
        files = sorted(read_manifest(directory)["files"].items())
        for name, expected in files[place.rank :: place.world_size]:
            path = directory / name
            if not path.is_file():
                raise CheckpointError(f"checkpoint {directory} lacks {name}: use another checkpoint")
            if _hash(path) != expected:
                raise CheckpointError(
                    f"{name} of checkpoint {directory} is damaged: its hash is not the one written"
                )


def _hash(path: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def _seal(content: Mapping[str, Any]) -> str:
    return blake3(json.dumps(content, sort_keys=True).encode()).hexdigest()
