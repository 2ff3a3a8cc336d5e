"""Writes the weights as an ordinary HF checkpoint directory, for serving and for the next stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from vz_ray.learner.checkpoint import begin_draft, seal
from vz_ray.learner.distributed import Place, agree
from vz_ray.learner.lora import is_adapted, peft_settings, trained_parameters
from vz_ray.learner.weights import TrainerSource, whole
from vz_ray.weights.version import TensorSpec

_SHARD_BYTES = 4 << 30
_INDEX = "model.safetensors.index.json"


def export_hf(directory: Path, hf: Any, base: Path, place: Place) -> None:
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
    draft = begin_draft(directory, place)
    with agree(place, f"writing {draft}"):
        _write_weights(draft, TrainerSource(hf), place)
        if is_adapted(hf):
            _write_adapter(draft / "adapter", hf, place)
    with agree(place, f"sealing {draft}"):
        if place.rank == 0:
            for file in companions(base):
                shutil.copy2(file, draft / file.name)
            seal(draft, directory, {"base": str(base)})


def _write_adapter(directory: Path, hf: Any, place: Place) -> None:
    """What was trained, and peft's description of it, written by rank 0 while all ranks gather."""
    from safetensors.torch import save_file

    parameters = trained_parameters(hf)
    with whole(list(parameters.values())):
        if place.rank:
            return
        tensors = {name: p.detach().to("cpu", copy=True).contiguous() for name, p in parameters.items()}
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    peft_settings(hf).save_pretrained(directory)


def companions(base: Path) -> list[Path]:
    """The files of a checkpoint directory that are not weights."""
    wanted = {".json", ".txt", ".jinja", ".model"}
    skipped = {_INDEX, "manifest.json"}
    return sorted(p for p in base.iterdir() if p.suffix in wanted and p.name not in skipped and p.is_file())


def _write_weights(draft: Path, source: TrainerSource, place: Place) -> None:
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
