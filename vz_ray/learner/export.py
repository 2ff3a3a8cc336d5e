"""Export of the policy as an HF checkpoint directory.

Exports are for serving and for the next training stage. The source is a running trainer, or a checkpoint on
disk. A checkpoint can be exported without a GPU, without its ranks and without DeepSpeed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from vz_ray.learner.checkpoint import hash_weight_files, read_checkpoint_meta
from vz_ray.learner.checkpoint_files import (
    CheckpointError,
    ShardReader,
    commit,
    staging_dir,
    verify_files,
    write_safetensors,
)
from vz_ray.learner.distributed import RankInfo, fail_together
from vz_ray.learner.lora import has_adapters, peft_config, peft_parameters
from vz_ray.learner.policy_model import load_pretrained
from vz_ray.learner.weight_sources import ZeroWeightSource, gathered
from vz_ray.learner.zero_state import WEIGHTS
from vz_ray.weight_sync.weight_version import TensorSpec

_SHARD_BYTES = 4 << 30
_INDEX = "model.safetensors.index.json"


def export_hf(directory: Path, hf: Any, base: Path, rank_info: RankInfo) -> None:
    """Write weights, configuration, tokenizer and processor atomically; every rank must call.

    Adapters are merged into the weights. The adapter alone is written to `adapter/` in peft's format:
    `PeftModel.from_pretrained(base, directory / "adapter")` loads the same policy.

    Args:
        directory: Target; must not exist.
        hf: The HF model, sharded or not.
        base: The checkpoint that training started from; its tokenizer, processor and configuration files
            are copied.

    Raises:
        FileExistsError: `directory` already exists.
    """
    with staging_dir(directory, rank_info) as staging:
        with fail_together(rank_info, f"writing {staging}"):
            _write_weights(staging, ZeroWeightSource(hf), rank_info)
            if has_adapters(hf):
                _write_adapter(staging / "adapter", hf, rank_info)
        with fail_together(rank_info, f"committing {staging}"):
            if rank_info.rank == 0:
                for file in non_weight_files(base):
                    shutil.copy2(file, staging / file.name)
                commit(staging, directory, {"base": str(base)})


def export_checkpoint(checkpoint: Path, directory: Path, base: Path | None = None) -> None:
    """Export a checkpoint; the files equal those of a trainer that resumes from it.

    The model is built on the CPU in its training dtype.

    Args:
        checkpoint: Output of `Trainer.save_checkpoint`, from any number of ranks.
        directory: Target; must not exist.
        base: The HF checkpoint that training started from; default is its path at that time.

    Raises:
        CheckpointError: The checkpoint is damaged or does not match `base`.
        UserError: `base` is not an HF checkpoint.
        FileExistsError: `directory` already exists.
    """
    rank_info = RankInfo(0, 1, torch.device("cpu"))
    meta = read_checkpoint_meta(checkpoint)
    verify_files(checkpoint, rank_info)
    base = base or Path(meta.model)
    hf = load_pretrained(base, getattr(torch, meta.dtype))
    if meta.frozen_weights_hash not in (None, hash_weight_files(base)):
        raise CheckpointError(
            f"checkpoint {checkpoint} has frozen parts and was trained on other weights than those of "
            f"{base}. Pass the model that training started from."
        )
    _load_weights(hf, ShardReader(checkpoint), checkpoint, base)
    export_hf(directory, hf, base, rank_info)


@torch.no_grad()
def _load_weights(hf: Any, shards: ShardReader, checkpoint: Path, base: Path) -> None:
    """Copy the trained weights into the model."""
    parameters = dict(hf.named_parameters())
    for name, shape in shards.shapes.items():
        if name not in parameters or tuple(parameters[name].shape) != shape:
            raise CheckpointError(
                f"checkpoint {checkpoint} holds {name} {list(shape)}, which {base} lacks. Pass the model "
                "that training started from. Only the trainer's own export merges adapters."
            )
        parameters[name].copy_(shards.read(WEIGHTS, name).view(shape))


def _write_adapter(directory: Path, hf: Any, rank_info: RankInfo) -> None:
    """Write the trained parameters and peft's config on rank 0, while all ranks gather."""
    parameters = peft_parameters(hf)
    with gathered(list(parameters.values())):
        if rank_info.rank:
            return
        tensors = {name: p.detach().to("cpu", copy=True).contiguous() for name, p in parameters.items()}
    directory.mkdir()
    write_safetensors(tensors, directory / "adapter_model.safetensors")
    peft_config(hf).save_pretrained(directory)


def non_weight_files(base: Path) -> list[Path]:
    """Return the files of a checkpoint directory other than weights and their indexes."""
    suffixes = {".json", ".txt", ".jinja", ".model"}
    skipped = {_INDEX, "manifest.json"}
    return sorted(
        path for path in base.iterdir() if path.suffix in suffixes and path.name not in skipped and path.is_file()
    )


def _write_weights(staging: Path, source: ZeroWeightSource, rank_info: RankInfo) -> None:
    """Write safetensors shards and their index on rank 0, while all ranks gather."""
    shards: dict[str, str] = {}
    specs = source.specs()
    for number, bucket in enumerate(source.buckets(_SHARD_BYTES)):
        if rank_info.rank:
            continue
        name = f"model-{number + 1:05d}.safetensors"
        # In-memory parameter names: HF's loader accepts these and the older released names.
        tensors = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in bucket.items()}
        write_safetensors(tensors, staging / name)
        shards |= dict.fromkeys(tensors, name)
    if rank_info.rank == 0:
        _write_shard_index(staging, shards, specs)


def _write_shard_index(staging: Path, shards: dict[str, str], specs: list[TensorSpec]) -> None:
    """Write the index of several shards, or rename a single one to `model.safetensors`."""
    if len(set(shards.values())) == 1:
        (staging / "model-00001.safetensors").rename(staging / "model.safetensors")
        return
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": shards}
    (staging / _INDEX).write_text(json.dumps(index, indent=1))
