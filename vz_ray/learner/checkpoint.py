"""Checkpoints of the trainer: complete or absent, checked before they are loaded, and loaded anywhere.

What is kept is what training goes on from, in one layout for every number of ranks and ZeRO stage:
float32 weights and Adam moments of the trained parameters under their HF names (`shards.py`), the
number of steps, and every rank's random state. Each rank writes what it holds, and reads what it needs.
All ranks write to, and read from, one shared directory. Nothing in it is unpickled.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch.distributed as dist
from blake3 import blake3

from vz_ray.config.learner import LearnerConfig
from vz_ray.learner.distributed import Place, agree, everywhere
from vz_ray.learner.engine import Engine
from vz_ray.learner.masters import MOMENTS, WEIGHTS, Masters, has_frozen, masters_of
from vz_ray.learner.rng import random_state, seed_from, set_random_state
from vz_ray.learner.sealed import (
    MANIFEST,
    CheckpointBroken,
    begin_draft,
    flushed,
    read_manifest,
    seal,
    verify,
)
from vz_ray.learner.shards import Shards, Where, require_same, write_index, write_shards

__all__ = ["MANIFEST", "CheckpointBroken", "Facts", "load", "read_facts", "save"]

FORMAT = 1
_FACTS = "learner.json"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a checkpoint says of the learner that wrote it.

    Attributes:
        steps: Optimizer steps done.
        updates: Those of them that moved the weights; 0 if there are no moments.
        world: Ranks that wrote it.
        zero_stage: Their ZeRO stage.
        dtype: What the model computes in, such as `bfloat16`.
        model: The HF checkpoint that training started from, as it was configured.
        frozen: Hash of its weight files if some of them stay as they were, else None.
    """

    steps: int
    updates: int
    world: int
    zero_stage: int
    dtype: str
    model: str
    frozen: str | None


def save(directory: Path, engine: Engine, place: Place, config: LearnerConfig) -> None:
    """Writes weights, moments, steps and every rank's random state; every rank must call.

    Raises:
        FileExistsError: `directory` is there already.
    """
    draft = begin_draft(directory, place)
    with agree(place, f"writing {draft}"):
        masters = masters_of(engine, place)
        where = _write(draft, masters, place)
        known = {file: flushed(draft / file) for file in {at[-1] for at in where}}
        (draft / _random_file(place.rank)).write_text(json.dumps(random_state()))
    parts: list[tuple[list[Where], dict[str, str]]] = _gathered((where, known), place)
    with agree(place, f"sealing {draft}"):
        if place.rank == 0:
            write_index(draft, masters.shapes, [at for part, _ in parts for at in part])
            facts = _facts(engine, masters, place, config)
            (draft / _FACTS).write_text(json.dumps(asdict(facts), indent=1))
            hashes = {file: text for _, known in parts for file, text in known.items()}
            seal(draft, directory, {"format": FORMAT}, hashes)


def load(directory: Path, engine: Engine, place: Place, config: LearnerConfig) -> None:
    """Restores what `save` wrote, after checking it; every rank must call.

    Ranks, ZeRO stage, dtype and offloading may differ from those that wrote it. With the same ones,
    training goes on bit for bit; with others, up to the order of additions. A rank beyond those that
    wrote it gets a random state that is seeded from rank 0's.

    Raises:
        CheckpointBroken: It is incomplete or damaged, of another model, or of a layout that is not read
            any more; on all ranks, and nothing was restored.
    """
    with everywhere(place, CheckpointBroken):
        facts = read_facts(directory)
    verify(directory, place)
    with everywhere(place, CheckpointBroken):
        shards, masters = Shards(directory), masters_of(engine, place)
        require_same(directory, shards.shapes, masters.shapes)
        if place.rank == 0:
            _require_frozen(directory, facts, engine, config)
    with agree(place, f"loading {directory}"):
        _read(shards, masters, facts.updates)
        masters.finish()
        engine.steps = facts.steps
        _restore_random(directory, place, facts.world)


def read_facts(directory: Path) -> Facts:
    """What a checkpoint says of its learner.

    Raises:
        CheckpointBroken: See `read_manifest`; or its layout is not read any more.
    """
    if read_manifest(directory)["facts"].get("format") != FORMAT:
        raise CheckpointBroken(
            f"checkpoint {directory} is of another version's layout: start from an HF export that the "
            "version which wrote it makes"
        )
    try:
        return Facts(**json.loads((directory / _FACTS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointBroken(f"checkpoint {directory} has no readable {_FACTS}: {error}") from error


def _write(draft: Path, masters: Masters, place: Place) -> list[Where]:
    kinds = (WEIGHTS, *MOMENTS) if masters.updates else (WEIGHTS,)
    pieces = masters.owned()
    return [at for kind in kinds for at in write_shards(draft, place.rank, kind, pieces, masters.get)]


def _read(shards: Shards, masters: Masters, updates: int) -> None:
    masters.reset(updates)
    for kind in (WEIGHTS, *MOMENTS) if updates else (WEIGHTS,):
        for piece in masters.held():
            masters.put(piece, kind, shards.read(kind, piece.name, piece.start, piece.stop))


def _facts(engine: Engine, masters: Masters, place: Place, config: LearnerConfig) -> Facts:
    frozen = has_frozen(engine.deepspeed.module)
    return Facts(
        steps=engine.steps,
        updates=masters.updates,
        world=place.world,
        zero_stage=config.zero_stage,
        dtype=str(engine.dtype).removeprefix("torch."),
        model=str(config.model),
        frozen=weights_hash(config.model) if frozen else None,
    )


def _require_frozen(directory: Path, facts: Facts, engine: Engine, config: LearnerConfig) -> None:
    """`CheckpointBroken` if the frozen parts, which are in no checkpoint, are not those it was made with."""
    if has_frozen(engine.deepspeed.module) and facts.frozen != weights_hash(config.model):
        raise CheckpointBroken(
            f"checkpoint {directory} holds what was trained on {facts.model}, and {config.model} has other "
            "weights in the frozen parts: resume with the model that it was written with"
        )


def weights_hash(model: str | Path) -> str:
    """Hash of the weight files of an HF checkpoint directory; files that did not change are read once."""
    paths = sorted(Path(model).glob("*.safetensors"))
    return _hash_of(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))


@lru_cache(maxsize=4)
def _hash_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    for path, _, _ in files:
        hasher.update_mmap(path)
    return hasher.hexdigest()


def _restore_random(directory: Path, place: Place, world: int) -> None:
    own = place.rank < world
    state: dict[str, Any] = json.loads((directory / _random_file(place.rank if own else 0)).read_text())
    if own:
        set_random_state(state)
    else:
        seed_from(state, place.rank)


def _random_file(rank: int) -> str:
    return f"random-{rank:05d}.json"


def _gathered(value: Any, place: Place) -> list[Any]:
    """Every rank's value, by rank."""
    parts = [value] * place.world
    if place.world > 1:
        dist.all_gather_object(parts, value)
    return parts
