"""Checkpoints of the trainer: atomic, verified before loading, independent of the number of ranks.

A checkpoint holds float32 weights and Adam moments of the trained parameters under their HF names, the
number of steps, and the random state of every rank. The layout is the same for every world size and ZeRO
stage. Each rank writes the slices that it holds and reads the slices that it needs. All ranks share one
directory. Nothing is unpickled.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from vz_ray.config.learner import LearnerConfig
from vz_ray.learner.checkpoint_files import (
    CheckpointError,
    ShardReader,
    SliceLocation,
    check_same_parameters,
    commit,
    fsync_and_hash,
    read_manifest,
    staging_dir,
    verify_files,
    write_index,
    write_shards,
)
from vz_ray.learner.distributed import RankInfo, all_gather_object, fail_together
from vz_ray.learner.entropy import EntropyController
from vz_ray.learner.train_engine import TrainEngine
from vz_ray.learner.zero_state import MOMENTS, WEIGHTS, ZeroState, create_zero_state, has_frozen_parameters, identity

FORMAT = 2
_META_FILE = "learner.json"


@dataclass(frozen=True, slots=True)
class CheckpointMeta:
    """Metadata of the learner that wrote a checkpoint.

    Attributes:
        steps: Optimizer steps.
        updates: Steps that changed the weights; 0 if the checkpoint has no moments.
        world_size: Number of ranks.
        zero_stage: ZeRO stage.
        dtype: Dtype of the model, such as `bfloat16`.
        model: Configured HF checkpoint that training started from.
        frozen_weights_hash: Hash of that checkpoint's weight files if some parameters are frozen, else None.
        entropy: State of the `EntropyController`; checkpoints of earlier versions have none.
    """

    steps: int
    updates: int
    world_size: int
    zero_stage: int
    dtype: str
    model: str
    frozen_weights_hash: str | None
    entropy: dict[str, Any] | None = None


def save_checkpoint(
    directory: Path,
    engine: TrainEngine,
    rank_info: RankInfo,
    config: LearnerConfig,
    on_host: Callable[[Tensor], Tensor] = identity,
    entropy: EntropyController | None = None,
) -> None:
    """Write weights, moments, steps and random states; every rank must call.

    Args:
        entropy: State of the entropy bonus.
        on_host: Returns the elements of offloaded tensors; see `StateOffloader.on_host`.

    Raises:
        FileExistsError: `directory` already exists.
    """
    with staging_dir(directory, rank_info) as staging:
        with fail_together(rank_info, f"writing {staging}"):
            zero_state = create_zero_state(engine, rank_info, on_host)
            locations = _write_slices(staging, zero_state, rank_info)
            hashes = {file: fsync_and_hash(staging / file) for file in {location[-1] for location in locations}}
            (staging / _rng_file(rank_info.rank)).write_text(json.dumps(get_rng_state()))
        parts = all_gather_object((locations, hashes), rank_info)
        with fail_together(rank_info, f"committing {staging}"):
            if rank_info.rank == 0:
                write_index(staging, zero_state.shapes, [location for locations, _ in parts for location in locations])
                meta = _build_meta(engine, zero_state, rank_info, config, entropy)
                (staging / _META_FILE).write_text(json.dumps(asdict(meta), indent=1))
                all_hashes = {file: digest for _, hashes in parts for file, digest in hashes.items()}
                commit(staging, directory, {"format": FORMAT}, all_hashes)


def load_checkpoint(directory: Path, engine: TrainEngine, rank_info: RankInfo, config: LearnerConfig) -> CheckpointMeta:
    """Verify a checkpoint and restore it; every rank must call. Returns its metadata.

    World size, ZeRO stage, dtype and offloading may differ from the run that wrote it. If they are equal,
    training on CPUs resumes bit for bit; otherwise up to the order of additions. Additional ranks get a random state
    seeded from rank 0's.

    Raises:
        CheckpointError: The checkpoint is incomplete, damaged, of another model or of an unsupported format;
            raised on all ranks before anything is restored.
    """
    with fail_together(rank_info, f"reading {directory}"):
        meta = read_checkpoint_meta(directory)
    verify_files(directory, rank_info)
    with fail_together(rank_info, f"reading {directory}"):
        shards, zero_state = ShardReader(directory), create_zero_state(engine, rank_info)
        check_same_parameters(directory, shards.shapes, zero_state.shapes)
        if rank_info.rank == 0:
            _check_frozen_weights(directory, meta, engine, config)
    with fail_together(rank_info, f"loading {directory}"):
        _read_slices(shards, zero_state, meta.updates)
        zero_state.sync_model_weights()
        engine.steps = meta.steps
        _restore_rng_state(directory, rank_info, meta.world_size)
    return meta


def read_checkpoint_meta(directory: Path) -> CheckpointMeta:
    """Return the metadata of a checkpoint.

    Raises:
        CheckpointError: The manifest is missing or was changed, or the format is not supported.
    """
    saved_format = read_manifest(directory)["metadata"].get("format")
    if saved_format != FORMAT:
        raise CheckpointError(
            f"checkpoint {directory} has format {saved_format}; this version reads format {FORMAT}. "
            "Export it with the version that wrote it and start from the export."
        )
    try:
        return CheckpointMeta(**json.loads((directory / _META_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"checkpoint {directory} has no readable {_META_FILE}: {error}") from error


def _write_slices(staging: Path, zero_state: ZeroState, rank_info: RankInfo) -> list[SliceLocation]:
    kinds = (WEIGHTS, *MOMENTS) if zero_state.optimizer_steps else (WEIGHTS,)
    slices = zero_state.slices_to_save()
    return [
        location for kind in kinds for location in write_shards(staging, rank_info.rank, kind, slices, zero_state.read)
    ]


def _read_slices(shards: ShardReader, zero_state: ZeroState, updates: int) -> None:
    zero_state.reset_moments(updates)
    for kind in (WEIGHTS, *MOMENTS) if updates else (WEIGHTS,):
        for param in zero_state.local_slices():
            zero_state.write(param, kind, shards.read(kind, param.name, param.start, param.stop))


def _build_meta(
    engine: TrainEngine,
    zero_state: ZeroState,
    rank_info: RankInfo,
    config: LearnerConfig,
    entropy: EntropyController | None,
) -> CheckpointMeta:
    frozen = has_frozen_parameters(engine.deepspeed.module)
    return CheckpointMeta(
        steps=engine.steps,
        updates=zero_state.optimizer_steps,
        world_size=rank_info.world_size,
        zero_stage=config.zero_stage,
        dtype=str(engine.dtype).removeprefix("torch."),
        model=str(config.model),
        frozen_weights_hash=hash_weight_files(config.model) if frozen else None,
        entropy=asdict(entropy) if entropy else None,
    )


def _check_frozen_weights(directory: Path, meta: CheckpointMeta, engine: TrainEngine, config: LearnerConfig) -> None:
    """Raise `CheckpointError` if the frozen weights, which no checkpoint holds, differ."""
    frozen = has_frozen_parameters(engine.deepspeed.module)
    if frozen and meta.frozen_weights_hash != hash_weight_files(config.model):
        raise CheckpointError(
            f"checkpoint {directory} was trained on {meta.model}, and {config.model} has other weights in "
            "the frozen parts. Resume with the model of the run that wrote it."
        )


def hash_weight_files(model: str | Path) -> str:
    """Return the hash of the weight files of an HF checkpoint directory; unchanged files are read once."""
    paths = sorted(Path(model).glob("*.safetensors"))
    return _hash_files(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))


@lru_cache(maxsize=4)
def _hash_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    for path, _, _ in files:
        hasher.update_mmap(path)
    return hasher.hexdigest()


def _restore_rng_state(directory: Path, rank_info: RankInfo, saved_world_size: int) -> None:
    has_state = rank_info.rank < saved_world_size
    file = directory / _rng_file(rank_info.rank if has_state else 0)
    state: dict[str, Any] = json.loads(file.read_text())
    if has_state:
        set_rng_state(state)
    else:
        seed_from_rank0(state, rank_info.rank)


def _rng_file(rank: int) -> str:
    return f"random-{rank:05d}.json"


def get_rng_state() -> dict[str, Any]:
    """Return the random states of Python, NumPy, torch on the CPU, and torch on this rank's GPU, as JSON."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    cuda = _encode_tensor(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": _encode_tensor(torch.get_rng_state()),
        "cuda": cuda,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore `get_rng_state`; without a saved GPU state, the GPU generator keeps its state."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_decode_tensor(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode_tensor(state["cuda"]))


def seed_from_rank0(state: dict[str, Any], rank: int) -> None:
    """Seed the generators of a rank without a saved state, deterministically from rank 0's state."""
    digest = blake3(f"{json.dumps(state)}/{rank}".encode()).digest(8)
    seed = int.from_bytes(digest, "little") >> 1  # torch takes 63 bits
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _encode_tensor(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
