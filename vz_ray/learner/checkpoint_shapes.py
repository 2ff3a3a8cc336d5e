"""Comparison of a checkpoint's tensors with its config.json, from the safetensors headers alone.

transformers initializes missing tensors randomly, skips unknown tensors, and only warns. Here both are errors,
raised before any tensor is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vz_ray.utils.errors import UserError, join_first
from vz_ray.weight_sync.weight_source import StoredLayout

Shape = tuple[int, ...]
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_MAX_LISTED = 3
"""Maximum number of tensors that an error lists per kind of mismatch."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in the header of a file."""

    shape: Shape
    file: str


def check_tensor_shapes(directory: str | Path) -> None:
    """Compare the tensors of an HF checkpoint directory with the model of its config.json.

    Both spellings of names are accepted, those of released checkpoints (`visual.`, `model.layers.`) and those
    of current transformers (`model.visual.`, `model.language_model.layers.`), through the renaming of
    transformers. A tied `lm_head` is optional.

    Raises:
        UserError: A file is missing, truncated or invalid; or tensors are missing, unexpected or have another
            shape. The message holds names and shapes.
    """
    path = Path(directory)
    model = _meta_model(path)
    layout = StoredLayout(model)
    expected = {name: layout.shape(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    stored = _rename_tensors(read_tensor_headers(path), model)
    for name, tensor in model.state_dict().items():
        if name in stored and stored[name].shape == tuple(tensor.shape) != expected[name]:
            raise UserError(
                f"model {str(path)!r} holds {name} as {list(tensor.shape)}, which is how transformers saves it; "
                f"released checkpoints and vLLM hold {list(expected[name])}. Exchange the last two dimensions of such "
                "tensors."
            )
    optional = {name for name, own in model.all_tied_weights_keys.items() if own in stored}
    mismatches = _find_mismatches(expected, stored, optional, model._keys_to_ignore_on_load_unexpected or ())
    if mismatches:
        raise UserError(
            f"model {str(path)!r} does not match its config.json: {'; '.join(mismatches)}. Download it again, "
            "or use the config.json that belongs to it."
        )


def read_tensor_headers(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a checkpoint directory by their names in the files; reads headers only.

    Raises:
        UserError: The weights or a file of the index are missing, or a file is damaged.
    """
    if (path / SINGLE).is_file():
        return read_safetensors_header(path / SINGLE)
    if not (path / INDEX).is_file():
        raise UserError(f"model {str(path)!r} has neither {SINGLE} nor {INDEX}. Download it again.")
    file_of_tensor = _read_index(path / INDEX)
    files = sorted(set(file_of_tensor.values()))
    if missing := [name for name in files if not (path / name).is_file()]:
        raise UserError(
            f"model {str(path)!r} lacks {_listed(missing)}, of {len(files)} files in {INDEX}. Download it again."
        )
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        tensors |= read_safetensors_header(path / name)
    if absent := sorted(file_of_tensor.keys() - tensors.keys()):
        raise UserError(f"model {str(path)!r}: {_listed(absent)} not in the files of {INDEX}. Download it again.")
    return tensors


def read_safetensors_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file; the file size must match their total size.

    Raises:
        UserError: The file is truncated or not in safetensors format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or not a safetensors file ({error}). Download it again.") from error
    return {name: StoredTensor(shape, file.name) for name, shape in shapes.items()}


def _read_index(file: Path) -> dict[str, str]:
    """Return the file name of each tensor.

    Raises:
        UserError: The index is invalid, or names a file in another directory.
    """
    try:
        weight_map = json.loads(file.read_text())["weight_map"]
        file_of_tensor = {str(name): str(target) for name, target in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a valid safetensors index ({error}). Download it again.") from error
    if outside := [target for target in file_of_tensor.values() if Path(target).name != target]:
        raise UserError(
            f"{file} names {outside[0]!r}; files must be in the same directory. Do not use this checkpoint."
        )
    return file_of_tensor


def _meta_model(path: Path) -> Any:
    """Build the model of `path`'s config.json on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    with no_init_weights(), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def _rename_tensors(stored: Mapping[str, StoredTensor], model: Any) -> dict[str, StoredTensor]:
    """Rename tensors to the model's names with the mapping of transformers.

    Raises:
        UserError: Two tensors map to the same name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    expected = model.state_dict()
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        model_name = rename_source_key(name, renamings, [], model.base_model_prefix, expected)[0]
        if model_name in renamed:
            raise UserError(f"{tensor.file} holds {name} twice, in two spellings. Remove one.")
        renamed[model_name] = tensor
    return renamed


def _find_mismatches(
    expected: Mapping[str, Shape],
    stored: Mapping[str, StoredTensor],
    optional: set[str],
    ignored: Iterable[str],
) -> list[str]:
    """Return one phrase per kind of mismatch."""
    missing = sorted(expected.keys() - stored.keys() - optional)
    ignored_names = re.compile("|".join(ignored)) if ignored else None
    extra = sorted(stored.keys() - expected.keys())
    unexpected = [
        f"{name} in {stored[name].file}" for name in extra if not (ignored_names and ignored_names.search(name))
    ]
    wrong_shape = [
        f"{name} is {list(stored[name].shape)} in {stored[name].file}, expected {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in stored and stored[name].shape != shape
    ]
    phrases = [f"missing {_listed([f'{name} {list(expected[name])}' for name in missing])}"] if missing else []
    if unexpected:
        phrases.append(f"unexpected {_listed(unexpected)}")
    if wrong_shape:
        phrases.append(f"of another shape: {_listed(wrong_shape)}")
    return phrases


def _listed(names: list[str]) -> str:
    return join_first(names, _MAX_LISTED, ", ")
