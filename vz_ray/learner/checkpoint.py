"""Checkpoints of the trainer: complete or absent, and checked before they are loaded.

A checkpoint is written beside its final name, flushed to disk, listed with
hashes in a manifest, and renamed as the last act. All ranks write to, and read
from, one shared directory.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from vz_ray.learner.distributed import Place, agree
from vz_ray.learner.engine import Engine
from vz_ray.observe.run_dir import sync_directory, write_atomic

MANIFEST = "manifest.json"
_TAG = "engine"


class CheckpointBroken(RuntimeError):
    """A checkpoint is incomplete, damaged, or of another shape of learner."""


def begin_draft(directory: Path, place: Place) -> Path:
    """An empty directory beside `directory`, to be filled and sealed; every rank must call.

    Raises:
        FileExistsError: `directory` is there already.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} exists, and is never written over: choose another directory")
    draft = directory.with_name(f".{directory.name}.draft")
    with agree(place, f"preparing {draft}"):
        if place.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
    return draft


def save(directory: Path, engine: Engine, place: Place, zero_stage: int) -> None:
    """Writes model, optimizer, schedule and every rank's random state; every rank must call.

    Raises:
        FileExistsError: `directory` is there already.
    """
    draft = begin_draft(directory, place)
    with agree(place, f"writing {draft}"):
        engine.deepspeed.save_checkpoint(str(draft), tag=_TAG, client_state={"steps": engine.steps})
        write_atomic(draft / f"random-{place.rank}.json", json.dumps(random_state()).encode())
    with agree(place, f"sealing {draft}"):
        if place.rank == 0:
            seal(draft, directory, {"world": place.world, "zero_stage": zero_stage, "steps": engine.steps})


def load(directory: Path, engine: Engine, place: Place, zero_stage: int) -> None:
    """Restores what `save` wrote, after checking it; every rank must call.

    Raises:
        CheckpointBroken: See `verify`; or it was written by another number of
            ranks or ZeRO stage.
    """
    with agree(place, f"checking {directory}"):
        facts = verify(directory) if place.rank == 0 else read_facts(directory)
        for name, ours in (("world", place.world), ("zero_stage", zero_stage)):
            if facts[name] != ours:
                raise CheckpointBroken(
                    f"{directory} was written with {name}={facts[name]}, this learner has {ours}: "
                    "resume with the former, or start from an HF export of it"
                )
    with agree(place, f"loading {directory}"):
        _, state = engine.deepspeed.load_checkpoint(str(directory), tag=_TAG)
        engine.steps = state["steps"]
        set_random_state(json.loads((directory / f"random-{place.rank}.json").read_text()))


def seal(draft: Path, final: Path, facts: dict[str, Any]) -> None:
    """Flushes all files of `draft`, writes its manifest, and renames it to `final`."""
    files = sorted(path for path in draft.rglob("*") if path.is_file())
    hashes = {}
    for path in files:
        hashes[str(path.relative_to(draft))] = _hash(path)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    write_atomic(draft / MANIFEST, json.dumps({"facts": facts, "files": hashes}, indent=1).encode())
    for folder in [draft, *(path for path in draft.rglob("*") if path.is_dir())]:
        sync_directory(folder)
    draft.rename(final)
    sync_directory(final.parent)


def read_facts(directory: Path) -> dict[str, Any]:
    """What the manifest says besides hashes; raises `CheckpointBroken` if there is none."""
    file = directory / MANIFEST
    if not file.is_file():
        raise CheckpointBroken(f"{directory} has no {MANIFEST}: no complete checkpoint was written there")
    facts: dict[str, Any] = json.loads(file.read_text())["facts"]
    return facts


def verify(directory: Path) -> dict[str, Any]:
    """Checks every file against its hash; returns the manifest's facts.

    Raises:
        CheckpointBroken: No manifest, a file is missing, or its bytes are not those written.
    """
    facts = read_facts(directory)
    for name, expected in json.loads((directory / MANIFEST).read_text())["files"].items():
        path = directory / name
        if not path.is_file():
            raise CheckpointBroken(f"checkpoint {directory} lacks {name}")
        if _hash(path) != expected:
            raise CheckpointBroken(
                f"{name} of checkpoint {directory} is damaged: its hash is not the one written"
            )
    return facts


def random_state() -> dict[str, Any]:
    """The generators of this process, as JSON."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    states = [torch.get_rng_state(), *on_gpus]
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": [base64.b64encode(state.numpy().tobytes()).decode() for state in states],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undoes `random_state`."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    tensors = [
        torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for text in state["torch"]
    ]
    torch.set_rng_state(tensors[0])
    if len(tensors) > 1:
        torch.cuda.set_rng_state_all(tensors[1:])


def _hash(path: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
