"""HF configs and models on the meta device from shapes, so that tests download nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vz_ray.families import ModelShape


def _qwen2_5_vl(shape: ModelShape) -> Any:
    from transformers import Qwen2_5_VLConfig

    vision = _vision(shape) | {
        "window_size": shape.vision.window_size,
        "fullatt_block_indexes": list(shape.vision.full_attention_blocks),
    }
    return Qwen2_5_VLConfig(
        text_config=_text(shape, sections=[2, 1, 1]),
        vision_config=vision,
        tie_word_embeddings=shape.text.tie_word_embeddings,
    )


def _qwen3_vl(shape: ModelShape) -> Any:
    from transformers import Qwen3VLConfig

    vision = _vision(shape) | {
        "num_position_embeddings": shape.vision.position_table,
        "deepstack_visual_indexes": list(shape.vision.deepstack_blocks),
    }
    text = _text(shape, sections=[2, 1, 1]) | {
        "head_dim": shape.text.head_dim,
        "attention_bias": shape.text.qkv_bias,
    }
    text["rope_parameters"]["mrope_interleaved"] = True
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=shape.text.tie_word_embeddings)


def _qwen3_vl_moe(shape: ModelShape) -> Any:
    from transformers import Qwen3VLMoeConfig

    experts = shape.text.experts
    assert experts is not None
    text = _text(shape, sections=[2, 1, 1]) | {
        "head_dim": shape.text.head_dim,
        "num_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.intermediate,
        "norm_topk_prob": True,
        "mlp_only_layers": [layer for layer in range(shape.text.layers) if layer not in experts.indices],
    }
    text["rope_parameters"]["mrope_interleaved"] = True
    vision = _vision(shape) | {
        "num_position_embeddings": shape.vision.position_table,
        "deepstack_visual_indexes": list(shape.vision.deepstack_blocks),
    }
    return Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=shape.text.tie_word_embeddings)


def _qwen3_5(shape: ModelShape) -> Any:
    from transformers import Qwen3_5Config

    linear = shape.text.linear
    assert linear is not None
    text = _text(shape, sections=[2, 1, 1]) | {
        "head_dim": shape.text.head_dim,
        "layer_types": [
            "linear_attention" if layer in linear.indices else "full_attention" for layer in range(shape.text.layers)
        ],
        "linear_num_key_heads": linear.key_heads,
        "linear_num_value_heads": linear.value_heads,
        "linear_key_head_dim": linear.key_head_dim,
        "linear_value_head_dim": linear.value_head_dim,
        "linear_conv_kernel_dim": linear.conv_kernel,
    }
    text["rope_parameters"] |= {"mrope_interleaved": True, "partial_rotary_factor": shape.text.rotary_share}
    vision = _vision(shape) | {"num_position_embeddings": shape.vision.position_table}
    return Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=shape.text.tie_word_embeddings)


def _text(shape: ModelShape, sections: list[int]) -> dict[str, Any]:
    """Return the text config; `sections` are the shares of time, rows and columns in the rotary positions."""
    text = shape.text
    half = int(text.head_dim * text.rotary_share) // 2
    unit = half // sum(sections)
    rest = half - unit * sum(sections)
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden,
        "intermediate_size": text.intermediate,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": text.tie_word_embeddings,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [unit * sections[0] + rest, unit * sections[1], unit * sections[2]],
        },
    }


def _vision(shape: ModelShape) -> dict[str, Any]:
    vision = shape.vision
    return {
        "depth": vision.depth,
        "hidden_size": vision.hidden,
        "intermediate_size": vision.intermediate,
        "num_heads": vision.heads,
        "out_hidden_size": vision.out_hidden,
        "patch_size": vision.patch_size,
        "spatial_merge_size": vision.merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "in_channels": vision.channels,
    }


_BUILDERS: dict[str, Callable[[ModelShape], Any]] = {
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "qwen3_5": _qwen3_5,
}


def hf_config(shape: ModelShape) -> Any:
    """Return the HF config of a shape; a family without a row here fails."""
    return _BUILDERS[shape.model_type](shape)


def build_on_meta(config: Any) -> Any:
    """Return the HF model of a config on the meta device."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    return model
