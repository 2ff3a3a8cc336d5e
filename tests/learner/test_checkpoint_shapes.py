"""Comparison of checkpoint headers with config.json, on tiny checkpoints and on sparse full-size ones."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.config.qwen_3b import architecture as architecture_3b
from tests.config.qwen_7b import architecture
from tests.families.hf_configs import build_on_meta
from tests.learner.training_data import small_model
from vz_ray.learner.checkpoint_shapes import INDEX, SINGLE, check_tensor_shapes, read_safetensors_header
from vz_ray.learner.policy_model import load_pretrained
from vz_ray.utils.errors import UserError

Shapes = dict[str, list[int]]
LARGE = {"3B": architecture_3b, "7B": architecture}


def write(file: Path, shapes: Mapping[str, list[int]]) -> None:
    """Write a sparse bfloat16 safetensors file, which uses no disk space for its data."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    with file.open("r+b") as opened:
        opened.truncate(8 + len(text) + end)


def write_sharded(directory: Path, shapes: Shapes, shards: int) -> None:
    names = list(shapes)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        shard_names = names[shard::shards]
        write(directory / file, {name: shapes[name] for name in shard_names})
        weight_map |= dict.fromkeys(shard_names, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def old_spelling(shapes: Shapes) -> Shapes:
    """Return the tensor names of released checkpoints."""
    return {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): shape
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module", params=list(LARGE))
def large(request: pytest.FixtureRequest) -> tuple[Any, Shapes]:
    """A config and the tensor shapes of its checkpoints, without a tied lm_head."""
    config = LARGE[request.param]()
    model = build_on_meta(config)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return config, shapes


@pytest.fixture
def directory(large: tuple[Any, Shapes], tmp_path: Path) -> Path:
    large[0].save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("spelled", [dict, old_spelling])
def test_complete_checkpoint_passes_in_both_spellings(large: tuple[Any, Shapes], directory: Path, spelled: Any) -> None:
    shapes = spelled(large[1])
    assert ("model.layers.0.mlp.up_proj.weight" in shapes) == (spelled is old_spelling)
    write_sharded(directory, shapes, 5)
    check_tensor_shapes(directory)
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    on_disk = sum(file.stat().st_blocks * 512 for file in directory.glob("*.safetensors"))
    assert size > 7e9
    assert on_disk < 4e6


def test_error_lists_all_mismatches_with_shapes(large: tuple[Any, Shapes], directory: Path) -> None:
    shapes = old_spelling(large[1])
    del shapes["model.layers.3.mlp.up_proj.weight"]
    expected = shapes["visual.merger.mlp.0.weight"]
    shapes["visual.merger.mlp.0.weight"] = [expected[0], expected[1] // 2]
    shapes["model.layers.99.mlp.up_proj.weight"] = [4, 4]
    write_sharded(directory, shapes, 3)
    with pytest.raises(UserError) as raised:
        check_tensor_shapes(directory)
    message = str(raised.value)
    assert "missing model.language_model.layers.3.mlp.up_proj.weight [" in message
    assert "unexpected model.language_model.layers.99.mlp.up_proj.weight in model-" in message
    assert f"model.visual.merger.mlp.0.weight is [{expected[0]}, {expected[1] // 2}] in" in message
    assert f"expected {expected}" in message


def test_weights_of_another_model_size_are_refused(large: tuple[Any, Shapes], tmp_path: Path) -> None:
    """The 7B config with 3B weights, and vice versa."""
    config, shapes = large
    other = architecture() if config.text_config.hidden_size == 2048 else architecture_3b()
    other.save_pretrained(tmp_path)
    write(tmp_path / SINGLE, shapes)
    with pytest.raises(UserError, match=r"of another shape.* and [0-9]+ more"):
        check_tensor_shapes(tmp_path)


def test_missing_shard_is_named(large: tuple[Any, Shapes], directory: Path) -> None:
    write_sharded(directory, large[1], 4)
    (directory / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model-00002-of-00004\.safetensors, of 4 files"):
        check_tensor_shapes(directory)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "copy"))


def shapes_of(model: Path) -> Shapes:
    return {name: list(stored.shape) for name, stored in read_safetensors_header(model / SINGLE).items()}


@pytest.mark.parametrize("model", [Path("assets/tiny-base")])
def test_tied_checkpoint_passes(model: Path) -> None:
    assert "lm_head.weight" not in read_safetensors_header(model / SINGLE)
    check_tensor_shapes(model)


def test_checkpoint_without_untied_lm_head_is_refused(copy: Path) -> None:
    check_tensor_shapes(copy)
    shapes = shapes_of(copy)
    del shapes["lm_head.weight"]
    write(copy / SINGLE, shapes)
    with pytest.raises(UserError, match=r"missing lm_head\.weight"):
        load_pretrained(copy, torch.float32)


def test_truncated_file_is_refused(copy: Path) -> None:
    size = (copy / SINGLE).stat().st_size
    with (copy / SINGLE).open("r+b") as opened:
        opened.truncate(size - 1000)
    with pytest.raises(UserError, match=r"is truncated or not a safetensors file .*incomplete metadata"):
        check_tensor_shapes(copy)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 4,
        struct.pack("<Q", 10**12) + b"{}",
        struct.pack("<Q", 3) + b"[1]",
        struct.pack("<Q", 2) + b"{]",
        struct.pack("<Q", 16) + b'{"a": {"b": 12}}',
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
)
def test_invalid_safetensors_file_is_refused(copy: Path, content: bytes) -> None:
    (copy / SINGLE).write_bytes(content)
    with pytest.raises(UserError, match="is truncated or not a safetensors file"):
        check_tensor_shapes(copy)


def test_tensor_in_two_spellings_is_refused(copy: Path) -> None:
    shapes = shapes_of(copy)
    twice = next(name for name in shapes if name.startswith(("model.visual.", "visual.")))
    other = twice.removeprefix("model.") if twice.startswith("model.") else f"model.{twice}"
    write(copy / SINGLE, shapes | {other: shapes[twice]})
    with pytest.raises(UserError, match="twice, in two spellings"):
        check_tensor_shapes(copy)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "not a valid safetensors index"),
        ("[", "not a valid safetensors index"),
        ('{"weight_map": {"a": "../elsewhere.safetensors"}}', "must be in the same directory"),
    ],
)
def test_invalid_index_is_refused(copy: Path, index: str, message: str) -> None:
    (copy / SINGLE).rename(copy / "model-00001-of-00001.safetensors")
    (copy / INDEX).write_text(index)
    with pytest.raises(UserError, match=message):
        check_tensor_shapes(copy)


def test_tensor_missing_from_its_shard_is_named(copy: Path) -> None:
    shapes = shapes_of(copy)
    write_sharded(copy, shapes, 1)
    (copy / SINGLE).unlink()
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["nowhere.weight"] = "model-00001-of-00001.safetensors"
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"nowhere\.weight not in the files"):
        check_tensor_shapes(copy)


def test_weights_under_another_file_name_are_refused(copy: Path) -> None:
    (copy / SINGLE).rename(copy / "weights.safetensors")
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        load_pretrained(copy, torch.float32)
