"""Whether a checkpoint's tensors are those that its config.json promises, without reading one of them.

transformers fills what is missing with random numbers, skips what it does not know, and warns. Here
both are errors, found in the headers of the safetensors files before anything is loaded.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vz_ray.utils.errors import UserError

Shape = tuple[int, ...]
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_MOST_HEADER = 100_000_000
"""Bytes; the format allows no longer header."""
_NAMED = 3
"""Tensors of each kind of fault that an error names; others are counted."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a file's header describes it."""

    shape: Shape
    file: str


def check_tensor_shapes(directory: str | Path) -> None:
    """Compares the tensors of a HF checkpoint directory with the model that its config.json describes.

    Names may be written as released checkpoints have them (`visual.`, `model.layers.`) or as
    transformers does now (`model.visual.`, `model.language_model.layers.`): they go through its own
    renaming. A tied `lm_head` may be left out.

    Raises:
        UserError: A file is missing, cut short or no safetensors; tensors are missing, unexpected, or
            of another shape, which are named with both shapes.
    """
    path = Path(directory)
    model = _on_meta(path)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = _renamed(read_tensor_headers(path), model)
    optional = {name for name, own in model.all_tied_weights_keys.items() if own in found}
    faults = _faults(expected, found, optional, model._keys_to_ignore_on_load_unexpected or ())
    if faults:
        raise UserError(
            f"model {str(path)!r} does not hold what its config.json says: {'; '.join(faults)}; "
            "download it again, or take the config.json that belongs to it"
        )


def read_tensor_headers(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint directory by the name that it has in its file; headers alone are read.

    Raises:
        UserError: There are no weights, a file that the index names is missing, or one is damaged.
    """
    if (path / SINGLE).is_file():
        return read_safetensors_header(path / SINGLE)
    if not (path / INDEX).is_file():
        raise UserError(f"model {str(path)!r} has neither {SINGLE} nor {INDEX}; download it again")
    places = _index(path / INDEX)
    files = sorted(set(places.values()))
    if missing := [name for name in files if not (path / name).is_file()]:
        raise UserError(
            f"model {str(path)!r} lacks {_some(missing)}, of {len(files)} files that {INDEX} names; "
            "download it again"
        )
    found: dict[str, StoredTensor] = {}
    for name in files:
        found |= read_safetensors_header(path / name)
    if absent := sorted(places.keys() - found.keys()):
        raise UserError(
            f"model {str(path)!r}: {_some(absent)} not in the files that {INDEX} says; download it again"
        )
    return found


def read_safetensors_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors that a safetensors file says it has; its length must be what they add up to.

    Raises:
        UserError: It is cut short, or no safetensors.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if not 0 < length <= min(_MOST_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes")
            entries = json.loads(opened.read(length))
        tensors = {name: entry for name, entry in entries.items() if name != "__metadata__"}
        ends = [int(entry["data_offsets"][1]) for entry in tensors.values()]
        shapes = {name: tuple(int(n) for n in entry["shape"]) for name, entry in tensors.items()}
    except (
        struct.error,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
    ) as error:
        raise UserError(
            f"{file} is no safetensors file, or cut short ({error}); download it again"
        ) from error
    if (promised := 8 + length + max(ends, default=0)) != size:
        raise UserError(f"{file} has {size:,} bytes, its header says {promised:,}; download it again")
    return {name: StoredTensor(shape, file.name) for name, shape in shapes.items()}


def _index(file: Path) -> dict[str, str]:
    """Tensor -> file, which lies beside the index.

    Raises:
        UserError: It is no index, or names a file elsewhere.
    """
    try:
        places = {str(name): str(place) for name, place in json.loads(file.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no index of safetensors files ({error}); download it again") from error
    if outside := [place for place in places.values() if Path(place).name != place]:
        raise UserError(f"{file} names {outside[0]!r}, which is not beside it; do not use this checkpoint")
    return places


def _on_meta(path: Path) -> Any:
    """The model of `path`'s config.json, without memory for its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    with no_init_weights(), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def _renamed(stored: Mapping[str, StoredTensor], model: Any) -> dict[str, StoredTensor]:
    """By the names that the model has, as transformers maps them when it loads.

    Raises:
        UserError: Two tensors come to the same name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    expected = model.state_dict()
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        own = rename_source_key(name, renamings, [], model.base_model_prefix, expected)[0]
        if own in found:
            raise UserError(f"{tensor.file}: {name} is there twice, in two spellings; remove one")
        found[own] = tensor
    return found


def _faults(
    expected: Mapping[str, Shape],
    found: Mapping[str, StoredTensor],
    optional: set[str],
    ignored: Iterable[str],
) -> list[str]:
    """One phrase for each kind of fault."""
    missing = sorted(expected.keys() - found.keys() - optional)
    known = re.compile("|".join(ignored)) if ignored else None
    beyond = sorted(found.keys() - expected.keys())
    unexpected = [f"{name} in {found[name].file}" for name in beyond if not (known and known.search(name))]
    other = [
        f"{name} is {list(found[name].shape)} in {found[name].file}, expected {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in found and found[name].shape != shape
    ]
    phrases = [f"missing {_some([f'{name} {list(expected[name])}' for name in missing])}"] if missing else []
    if unexpected:
        phrases.append(f"unexpected {_some(unexpected)}")
    if other:
        phrases.append(f"of another shape: {_some(other)}")
    return phrases


def _some(names: list[str]) -> str:
    """The first few, and how many more."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
