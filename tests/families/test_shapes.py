"""Shapes of all families against HF models on the meta device."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.config.qwen_3b import PARAMETERS as PARAMETERS_3B
from tests.config.qwen_7b import PARAMETERS, VISION_PARAMETERS
from tests.families.hf_configs import build_on_meta, hf_config
from tests.planning.pass_memory import WIDE_SHAPES
from vz_ray.families import FAMILIES, family_of, load_hf_config, load_model_shape, model_shape, processor_max_pixels
from vz_ray.utils.errors import UserError

TINY = Path("assets/tiny-base")
KNOWN = [name for family in FAMILIES.values() for name in family.known_shapes]
RELEASED_PARAMETERS = {
    "Qwen2.5-VL-3B": PARAMETERS_3B,
    "Qwen2.5-VL-7B": PARAMETERS,
    "Qwen3-VL-2B": 2_127_532_032,
    "Qwen3-VL-4B": 4_437_815_808,
    "Qwen3-VL-8B": 8_767_123_696,
    "Qwen3-VL-30B-A3B": 31_070_754_032,
}
"""Published parameter counts of released checkpoints."""


def count_params(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", KNOWN)
def test_known_shape_matches_parameters_and_layers_of_transformers(name: str) -> None:
    shape = load_model_shape(name)
    config = hf_config(shape)
    assert model_shape(config) == shape == load_model_shape(f"models/{name}-Instruct")
    model = build_on_meta(config)
    assert shape.parameters == count_params(model)
    assert shape.vision.parameters == count_params(model.model.visual)
    visual = model.model.visual
    mergers = [module for child, module in visual.named_children() if "merger" in child]
    assert shape.vision.merger_parameters == sum(count_params(module) for module in mergers)
    linear = {
        key: (module.in_features, module.out_features)
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear) and key != "lm_head"
    }
    assert dict(FAMILIES[shape.model_type].linear_layers(shape)) == linear


@pytest.mark.parametrize(("name", "parameters"), RELEASED_PARAMETERS.items())
def test_parameters_match_released_checkpoints(name: str, parameters: int) -> None:
    assert load_model_shape(name).parameters == parameters


def test_vision_parameters_match_the_released_7b_checkpoint() -> None:
    assert load_model_shape("Qwen2.5-VL-7B").vision.parameters == VISION_PARAMETERS


@pytest.mark.parametrize(("step", "excluded", "layers"), [(1, [], (0, 1, 2, 3)), (2, [], (1, 3)), (1, [2], (0, 1, 3))])
def test_layers_with_experts_are_those_of_transformers(step: int, excluded: list[int], layers: tuple[int, ...]) -> None:
    config = hf_config(WIDE_SHAPES["qwen3_vl_moe"])
    text = config.text_config
    text.num_hidden_layers, text.decoder_sparse_step, text.mlp_only_layers = 4, step, excluded
    shape, model = model_shape(config), build_on_meta(config)
    assert shape.text.experts is not None
    assert shape.text.experts.indices == layers
    with_experts = [hasattr(layer.mlp, "experts") for layer in model.model.language_model.layers]
    assert with_experts == [layer in layers for layer in range(4)]
    assert shape.parameters == count_params(model)


def test_shape_loads_from_config_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((TINY / "config.json").read_text())
    shape = load_model_shape(str(tmp_path))
    from safetensors import safe_open

    with safe_open(TINY / "model.safetensors", framework="np") as stored:
        sizes = [stored.get_slice(name).get_shape() for name in stored.keys()]  # noqa: SIM118
    assert shape.parameters == sum(prod(size) for size in sizes)


def test_processor_max_pixels_come_from_checkpoint_or_family(tmp_path: Path) -> None:
    assert processor_max_pixels(str(TINY)) == 100_352
    assert processor_max_pixels(str(tmp_path)) == processor_max_pixels("") == 12_845_056
    assert processor_max_pixels("Qwen3-VL-8B-Instruct") == processor_max_pixels("Qwen3.5-4B") == 16_777_216


@pytest.mark.parametrize(("model", "message"), [("", "model is not set"), ("/models/mine", "no config.json")])
def test_unknown_model_raises_with_known_names(model: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"{message}.*model=Qwen2\.5-VL-7B.*model=Qwen3-VL-8B"):
        load_model_shape(model)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("qwen2_vl", ""), ("qwen3_5_moe", "routing of its experts"), ("llava", ""), ("", "")],
)
def test_unsupported_family_raises_with_supported_ones(tmp_path: Path, model_type: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError, match=rf"'{model_type}'.*{reason}.*qwen2_5_vl \(Qwen2.5-VL\), qwen3_vl \(Qwen3-VL\)"):
        load_model_shape(str(tmp_path))


def variants() -> list[tuple[str, str, dict[str, Any], str]]:
    """Family, section of config.json, changed fields and expected message of unsupported variants."""
    quantized = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    cases = [(family, "", quantized, "quantization_config") for family in FAMILIES]
    sliding = {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 36, "sliding_window": 64}
    return [
        *cases,
        ("qwen2_5_vl", "text_config", sliding, "sliding_attention.*use_sliding_window"),
        ("qwen3_vl", "vision_config", {"deepstack_visual_indexes": [3, 99]}, r"deepstack_visual_indexes.*\[3, 99\]"),
        ("qwen3_vl", "vision_config", {"num_position_embeddings": 2300}, "num_position_embeddings.*2300.*square"),
        ("qwen3_vl_moe", "text_config", {"norm_topk_prob": False}, "norm_topk_prob.*False; supported: true"),
        ("qwen3_vl_moe", "text_config", {"attention_bias": True}, "attention_bias.*true"),
        ("qwen3_vl_moe", "text_config", {"shared_expert_intermediate_size": 64}, "shared_expert.* is 64; supported: 0"),
        ("qwen3_vl_moe", "text_config", {"decoder_sparse_step": 99}, "mlp_only_layers.*model_type qwen3_vl"),
        ("qwen3_vl_moe", "text_config", {"moe_intermediate_size": 1024}, "moe_intermediate_size.*1024.*hidden_size"),
        ("qwen3_5", "text_config", {"attention_bias": True}, "attention_bias.*true"),
        ("qwen3_5", "text_config", {"layer_types": ["sliding_attention"] * 24}, "layer_types.*sliding_attention"),
        ("qwen3_5", "text_config", {"layer_types": ["linear_attention"] * 3}, r"not valid.*\(3\)"),
    ]


@pytest.mark.parametrize(("family", "section", "changes", "message"), variants())
def test_unsupported_variant_raises_with_family_and_field(
    tmp_path: Path, family: str, section: str, changes: dict[str, Any], message: str
) -> None:
    shape = next(iter(FAMILIES[family].known_shapes.values()))
    content = json.loads(hf_config(shape).to_json_string(use_diff=False))
    (content[section] if section else content).update(changes)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{FAMILIES[family].name}: .*{message}"):
        load_hf_config(tmp_path)


def test_damaged_config_raises_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"config\.json is not valid JSON.*Download it again"):
        load_hf_config(tmp_path)


def test_family_lookup_names_the_model() -> None:
    with pytest.raises(UserError, match="model_type of my model is 'gemma3'"):
        family_of("gemma3", "my model")
