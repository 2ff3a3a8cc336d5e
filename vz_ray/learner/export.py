"""Whole weights under their HF names, and their export as an HF checkpoint directory.

Exports are for serving and for the next training stage. The source is a running trainer, or a checkpoint on
disk. A checkpoint can be exported without a GPU, without its ranks and without DeepSpeed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
from vz_ray.learner.lora import base_parameter_name, has_adapters, lora_deltas, peft_config, peft_parameters
from vz_ray.learner.policy_model import load_pretrained
from vz_ray.learner.state_offload import StateOffloader
from vz_ray.learner.zero_state import WEIGHTS
from vz_ray.weight_sync.weight_source import StoredLayout, split_into_buckets
from vz_ray.weight_sync.weight_version import TensorSpec, dtype_name

_SHARD_BYTES = 4 << 30
_INDEX = "model.safetensors.index.json"


class ZeroWeightSource:
    """`WeightSource` over the whole parameters of an HF model under DeepSpeed, for every ZeRO stage.

    Tied tensors appear once, under the embedding's name. Every rank must iterate over `buckets` with the same
    `max_bytes`: under ZeRO-3 each bucket is gathered. Adapters are merged into copies of the weights; the
    trained parameters do not change. See `learner/lora.py`.

    Args:
        hf: The HF model.
        offloader: Reads weights in host memory while they are offloaded; None if they never are.
    """

    def __init__(self, hf: nn.Module, offloader: StateOffloader | None = None) -> None:
        self._offloader = offloader
        self._layout = StoredLayout(hf)
        named = ((base_parameter_name(name), parameter) for name, parameter in hf.named_parameters())
        self._parameters = {name: parameter for name, parameter in named if name is not None}
        self._deltas = lora_deltas(hf)

    def specs(self) -> list[TensorSpec]:
        """Return names, dtypes and whole shapes, without moving data."""
        return [
            TensorSpec(name, dtype_name(p.dtype), self._layout.shape(name, tuple(getattr(p, "ds_shape", p.shape))))
            for name, p in self._parameters.items()
        ]

    def buckets(self, max_bytes: int) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors in the order of `specs`; a bucket is valid until the next one is requested."""
        for group in split_into_buckets(self.specs(), max_bytes):
            names = [spec.name for spec in group]
            parameters = [self._parameters[name] for name in names]
            added = [delta for name in names if (delta := self._deltas.get(name))]
            with self._whole([*parameters, *(p for delta in added for p in (delta.a, delta.b))]) as whole:
                yield {
                    name: self._layout.tensor(name, self._merged(name, p, whole))
                    for name, p in zip(names, parameters, strict=True)
                }

    @contextmanager
    def _whole(self, parameters: list[nn.Parameter]) -> Iterator[dict[nn.Parameter, Tensor]]:
        """Yield the whole tensor of each parameter, on the device or in host memory."""
        offloader = self._offloader
        if offloader is not None and offloader.has_weights_on_host:
            yield {p: _gather_on_host(p, offloader) for p in parameters}
            return
        with gathered(parameters):
            yield {p: p.data for p in parameters}

    def _merged(self, name: str, parameter: nn.Parameter, whole: dict[nn.Parameter, Tensor]) -> Tensor:
        delta = self._deltas.get(name)
        if delta is None:
            return whole[parameter]
        return replace(delta, a=whole[delta.a], b=whole[delta.b]).merge_into(whole[parameter])


def _gather_on_host(parameter: Any, offloader: StateOffloader) -> Tensor:
    """Return a parameter whose storage is in host memory; under ZeRO-3 every rank must call."""
    if not hasattr(parameter, "ds_id"):
        return offloader.on_host(parameter.data)
    shard = offloader.on_host(parameter.ds_tensor).cpu()
    shards = [shard]
    if dist.is_initialized() and (world_size := dist.get_world_size()) > 1:
        shards = [torch.empty_like(shard) for _ in range(world_size)]
        dist.all_gather([part.view(torch.uint8) for part in shards], shard.view(torch.uint8))
    return torch.cat(shards)[: parameter.ds_numel].view(parameter.ds_shape)


def gathered(parameters: list[nn.Parameter]) -> Any:
    """Return a context in which sharded parameters are whole on every rank."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)


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
