"""Public architecture of Qwen2.5-VL-7B-Instruct as numbers, so that tests download nothing."""

from __future__ import annotations

from typing import Any

PARAMETERS = 8_292_166_656
"""Parameters of the released checkpoint: 16,584,333,312 bytes of bfloat16."""
VISION_PARAMETERS = 676_550_144

TEXT = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128_000,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
}
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


def architecture() -> Any:
    """Return its `Qwen2_5_VLConfig`."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(text_config=dict(TEXT), vision_config=dict(VISION), tie_word_embeddings=False)


def on_meta() -> Any:
    """Return the model on the meta device, without weights."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(architecture())
