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
from vz_ray.learner.atomic_dir import (
    MANIFEST,
    CheckpointError,
    commit,
    create_draft,
    fsync_and_hash,
    read_manifest,
    verify_files,
)
from vz_ray.learner.distributed import RankInfo, fail_together, reraise_on_all_ranks
from vz_ray.learner.rng import get_rng_state, seed_from_rank0, set_rng_state
from vz_ray.learner.sharded_io import (
    ShardReader,
    SliceLocation,
    check_same_parameters,
    write_index,
    write_shards,
)
from vz_ray.learner.train_engine import TrainEngine
from vz_ray.learner.zero_state import MOMENTS, WEIGHTS, ZeroState, create_zero_state, has_frozen_parameters

__all__ = [
    "MANIFEST",
    "CheckpointError",
    "CheckpointMeta",
    "load_checkpoint",
    "read_checkpoint_meta",
    "save_checkpoint",
]

FORMAT = 1
_FACTS = "learner.json"


@dataclass(frozen=True, slots=True)
class CheckpointMeta:
    """What a checkpoint says of the learner that wrote it.

    Attributes:
        steps: Optimizer steps done.
        updates: Those of them that moved the weights; 0 if there are no moments.
        world_size: Ranks that wrote it.
        zero_stage: Their ZeRO stage.
        dtype: What the model computes in, such as `bfloat16`.
        model: The HF checkpoint that training started from, as it was configured.
        frozen_weights_hash: Hash of its weight files if some of them stay as they were, else None.
    """

    steps: int
    updates: int
    world_size: int
    zero_stage: int
    dtype: str
    model: str
    frozen_weights_hash: str | None


def save_checkpoint(directory: Path, engine: TrainEngine, place: RankInfo, config: LearnerConfig) -> None:
    """Writes weights, moments, steps and every rank's random state; every rank must call.

    Raises:
        FileExistsError: `directory` is there already.
    """
    draft = create_draft(directory, place)
    with fail_together(place, f"writing {draft}"):
        masters = create_zero_state(engine, place)
        where = _write(draft, masters, place)
        known = {file: fsync_and_hash(draft / file) for file in {at[-1] for at in where}}
        (draft / _random_file(place.rank)).write_text(json.dumps(get_rng_state()))
    parts: list[tuple[list[SliceLocation], dict[str, str]]] = _gathered((where, known), place)
    with fail_together(place, f"sealing {draft}"):
        if place.rank == 0:
            write_index(draft, masters.shapes, [at for part, _ in parts for at in part])
            facts = _facts(engine, masters, place, config)
            (draft / _FACTS).write_text(json.dumps(asdict(facts), indent=1))
            hashes = {file: text for _, known in parts for file, text in known.items()}
            commit(draft, directory, {"format": FORMAT}, hashes)


def load_checkpoint(directory: Path, engine: TrainEngine, place: RankInfo, config: LearnerConfig) -> None:
    """Restores what `save` wrote, after checking it; every rank must call.

    Ranks, ZeRO stage, dtype and offloading may differ from those that wrote it. With the same ones,
    training goes on bit for bit; with others, up to the order of additions. A rank beyond those that
    wrote it gets a random state that is seeded from rank 0's.

    Raises:
        CheckpointBroken: It is incomplete or damaged, of another model, or of a layout that is not read
            any more; on all ranks, and nothing was restored.
    """
    with reraise_on_all_ranks(place, CheckpointError):
        facts = read_checkpoint_meta(directory)
    verify_files(directory, place)
    with reraise_on_all_ranks(place, CheckpointError):
        shards, masters = ShardReader(directory), create_zero_state(engine, place)
        check_same_parameters(directory, shards.shapes, masters.shapes)
        if place.rank == 0:
            _require_frozen(directory, facts, engine, config)
    with fail_together(place, f"loading {directory}"):
        _read(shards, masters, facts.updates)
        masters.sync_model_weights()
        engine.steps = facts.steps
        _restore_random(directory, place, facts.world_size)


def read_checkpoint_meta(directory: Path) -> CheckpointMeta:
    """What a checkpoint says of its learner.

    Raises:
        CheckpointBroken: See `read_manifest`; or its layout is not read any more.
    """
    if read_manifest(directory)["facts"].get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {directory} is of another version's layout: start from an HF export that the "
            "version which wrote it makes"
        )
    try:
        return CheckpointMeta(**json.loads((directory / _FACTS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"checkpoint {directory} has no readable {_FACTS}: {error}") from error


def _write(draft: Path, masters: ZeroState, place: RankInfo) -> list[SliceLocation]:
    kinds = (WEIGHTS, *MOMENTS) if masters.optimizer_steps else (WEIGHTS,)
    pieces = masters.slices_to_save()
    return [at for kind in kinds for at in write_shards(draft, place.rank, kind, pieces, masters.read)]


def _read(shards: ShardReader, masters: ZeroState, updates: int) -> None:
    masters.reset_moments(updates)
    for kind in (WEIGHTS, *MOMENTS) if updates else (WEIGHTS,):
        for piece in masters.local_slices():
            masters.write(piece, kind, shards.read(kind, piece.name, piece.start, piece.stop))


def _facts(engine: TrainEngine, masters: ZeroState, place: RankInfo, config: LearnerConfig) -> CheckpointMeta:
    frozen = has_frozen_parameters(engine.deepspeed.module)
    return CheckpointMeta(
        steps=engine.steps,
        updates=masters.optimizer_steps,
        world_size=place.world_size,
        zero_stage=config.zero_stage,
        dtype=str(engine.dtype).removeprefix("torch."),
        model=str(config.model),
        frozen_weights_hash=hash_weight_files(config.model) if frozen else None,
    )


def _require_frozen(
    directory: Path, facts: CheckpointMeta, engine: TrainEngine, config: LearnerConfig
) -> None:
    """`CheckpointError` if the frozen parts, which are in no checkpoint, are not those it was made with."""
    if has_frozen_parameters(engine.deepspeed.module) and facts.frozen_weights_hash != hash_weight_files(
        config.model
    ):
        raise CheckpointError(
            f"checkpoint {directory} holds what was trained on {facts.model}, and {config.model} has other "
            "weights in the frozen parts: resume with the model that it was written with"
        )


def hash_weight_files(model: str | Path) -> str:
    """Hash of the weight files of an HF checkpoint directory; files that did not change are read once."""
    paths = sorted(Path(model).glob("*.safetensors"))
    return _hash_of(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))


@lru_cache(maxsize=4)
def _hash_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    for path, _, _ in files:
        hasher.update_mmap(path)
    return hasher.hexdigest()


def _restore_random(directory: Path, place: RankInfo, world: int) -> None:
    own = place.rank < world
    state: dict[str, Any] = json.loads((directory / _random_file(place.rank if own else 0)).read_text())
    if own:
        set_rng_state(state)
    else:
        seed_from_rank0(state, place.rank)


def _random_file(rank: int) -> str:
    return f"random-{rank:05d}.json"


def _gathered(value: Any, place: RankInfo) -> list[Any]:
    """Every rank's value, by rank."""
    parts = [value] * place.world_size
    if place.world_size > 1:
        dist.all_gather_object(parts, value)
    return parts
