"""Checkpoints of Qwen2.5-VL with random weights, at the sizes of real models."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of a Qwen2.5-VL. Heads of the language model have `hidden / heads` channels, those of the tower 80."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    vision_hidden: int
    depth: int


SIZES = {
    "7b": ModelSize(3584, 28, 28, 4, 18944, 152_064, 1280, 32),
    "small": ModelSize(256, 2, 2, 1, 512, 2048, 160, 2),
}
"""Qwen2.5-VL-7B, and a small model for a rehearsal."""


def write_random_checkpoint(size: ModelSize, dtype: str, tokenizer_from: Path, directory: Path) -> dict[str, Any]:
    """Write a checkpoint with the tokenizer and processor of another one; return its size.

    Weights are created on the GPU if there is one.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = make_config(size, tokenizer_from)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(directory)
    for file in tokenizer_from.iterdir():
        if file.suffix != ".safetensors" and not (directory / file.name).exists():
            shutil.copy(file, directory)
    count = sum(p.numel() for p in model.parameters())
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"parameters": count, "gigabytes": sum(f.stat().st_size for f in directory.iterdir()) / 1e9}


def make_config(size: ModelSize, tokenizer_from: Path) -> Any:
    """Return the `Qwen2_5_VLConfig` with the token ids of another checkpoint."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tokenizer_from)
    text, vision = config.text_config, config.vision_config
    half = size.hidden // size.heads // 2
    time, height = half // 4, half // 8 * 3
    for key, value in {
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "intermediate_size": size.mlp,
        "vocab_size": size.vocab,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "layer_types": ["full_attention"] * size.layers,
        "max_window_layers": size.layers,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [time, height, half - time - height],
        },
    }.items():
        setattr(text, key, value)
    vision.hidden_size, vision.depth, vision.num_heads = size.vision_hidden, size.depth, size.vision_hidden // 80
    vision.intermediate_size, vision.out_hidden_size = round(2.67 * size.vision_hidden / 4) * 4, size.hidden
    vision.fullatt_block_indexes = list(range(7, size.depth, 8)) or [size.depth - 1]
    config.tie_word_embeddings = False
    return config
