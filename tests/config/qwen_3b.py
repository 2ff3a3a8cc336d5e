"""Public architecture of Qwen2.5-VL-3B-Instruct as numbers, so that tests download nothing."""

from __future__ import annotations

from typing import Any

from tests.config.qwen_7b import VISION

PARAMETERS = 3_754_622_976
"""Parameters of the released checkpoint: 7,509,245,952 bytes of bfloat16."""


def architecture() -> Any:
    """Return its `Qwen2_5_VLConfig`."""
    from transformers import Qwen2_5_VLConfig

    text = {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": True,
    }
    vision = VISION | {"out_hidden_size": 2048}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
