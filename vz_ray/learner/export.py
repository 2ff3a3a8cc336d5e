"""Writes the weights as an ordinary HF checkpoint directory, for serving and for the next stage.

From a running trainer, or from a checkpoint on disk: the latter needs no GPU, no ranks and no DeepSpeed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from vz_ray.learner.atomic_dir import CheckpointError, commit, create_draft, verify_files
from vz_ray.learner.checkpoint import hash_weight_files, read_checkpoint_meta
from vz_ray.learner.distributed import RankInfo, fail_together
from vz_ray.learner.lora import has_adapters, peft_config, peft_parameters
from vz_ray.learner.policy_model import load_pretrained
from vz_ray.learner.sharded_io import ShardReader
from vz_ray.learner.weight_source import ZeroWeightSource, gathered
from vz_ray.learner.zero_state import WEIGHTS
from vz_ray.weight_sync.weight_version import TensorSpec

_SHARD_BYTES = 4 << 30
_INDEX = "model.safetensors.index.json"


def export_hf(directory: Path, hf: Any, base: Path, place: RankInfo) -> None:
    """Writes weights, configuration, tokenizer and processor; every rank must call.

    Of a model with adapters the weights are merged, and the adapter lies beside them in `adapter/`, in
    peft's own format: `PeftModel.from_pretrained(base, directory / "adapter")` is the same policy.

    Args:
        directory: Must not exist; complete or absent.
        hf: The HF model, sharded or not.
        base: The checkpoint that training started from, whose tokenizer,
            processor and configuration files are copied as they are.

    Raises:
        FileExistsError: `directory` is there already.
    """
    draft = create_draft(directory, place)
    with fail_together(place, f"writing {draft}"):
        _write_weights(draft, ZeroWeightSource(hf), place)
        if has_adapters(hf):
            _write_adapter(draft / "adapter", hf, place)
    with fail_together(place, f"sealing {draft}"):
        if place.rank == 0:
            for file in non_weight_files(base):
                shutil.copy2(file, draft / file.name)
            commit(draft, directory, {"base": str(base)})


def export_checkpoint(checkpoint: Path, directory: Path, base: Path | None = None) -> None:
    """Writes what a trainer that resumes from `checkpoint` would export: the same bytes.

    The model is built on the CPU, in the type that it was trained in.

    Args:
        checkpoint: What `Trainer.save_checkpoint` wrote, by any number of ranks.
        directory: Must not exist; complete or absent.
        base: The HF checkpoint that training started from; by default where it was then.

    Raises:
        CheckpointBroken: It is damaged, or does not go with `base`.
        UserError: `base` is no HF checkpoint.
        FileExistsError: `directory` is there already.
    """
    place = RankInfo(0, 1, torch.device("cpu"))
    facts = read_checkpoint_meta(checkpoint)
    verify_files(checkpoint, place)
    base = base or Path(facts.model)
    hf = load_pretrained(base, getattr(torch, facts.dtype))
    if facts.frozen_weights_hash not in (None, hash_weight_files(base)):
        raise CheckpointError(
            f"checkpoint {checkpoint} was trained on other weights than those of {base}, parts of which it "
            "left as they were: give the model that training started from"
        )
    _fill(hf, ShardReader(checkpoint), checkpoint, base)
    export_hf(directory, hf, base, place)


@torch.no_grad()
def _fill(hf: Any, shards: ShardReader, checkpoint: Path, base: Path) -> None:
    """Puts the trained weights in their places."""
    parameters = dict(hf.named_parameters())
    for name, shape in shards.shapes.items():
        if name not in parameters or tuple(parameters[name].shape) != shape:
            raise CheckpointError(
                f"checkpoint {checkpoint} holds {name} {list(shape)}, which {base} has not: give the model "
                "that training started from; adapters are merged by the trainer's own export alone"
            )
        parameters[name].copy_(shards.read(WEIGHTS, name).view(shape))


def _write_adapter(directory: Path, hf: Any, place: RankInfo) -> None:
    """What was trained, and peft's description of it, written by rank 0 while all ranks gather."""
    from safetensors.torch import save_file

    parameters = peft_parameters(hf)
    with gathered(list(parameters.values())):
        if place.rank:
            return
        tensors = {name: p.detach().to("cpu", copy=True).contiguous() for name, p in parameters.items()}
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    peft_config(hf).save_pretrained(directory)


def non_weight_files(base: Path) -> list[Path]:
    """The files of a checkpoint directory that are not weights."""
    wanted = {".json", ".txt", ".jinja", ".model"}
    skipped = {_INDEX, "manifest.json"}
    return sorted(p for p in base.iterdir() if p.suffix in wanted and p.name not in skipped and p.is_file())


def _write_weights(draft: Path, source: ZeroWeightSource, place: RankInfo) -> None:
    """Shards of safetensors and their index, written by rank 0 while all ranks gather."""
    from safetensors.torch import save_file

    shards: dict[str, str] = {}
    specs = source.specs()
    for number, bucket in enumerate(source.buckets(_SHARD_BYTES)):
        if place.rank:
            continue
        name = f"model-{number + 1:05d}.safetensors"
        # Names are kept as the model has them in memory; HF's loader knows them as well as its older ones.
        tensors = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in bucket.items()}
        save_file(tensors, draft / name, metadata={"format": "pt"})
        shards |= dict.fromkeys(tensors, name)
    if place.rank == 0:
        _name_shards(draft, shards, specs)


def _name_shards(draft: Path, shards: dict[str, str], specs: list[TensorSpec]) -> None:
    if len(set(shards.values())) == 1:
        (draft / "model-00001.safetensors").rename(draft / "model.safetensors")
        return
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": shards}
    (draft / _INDEX).write_text(json.dumps(index, indent=1))
