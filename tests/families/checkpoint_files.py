"""Checkpoint directories without weights: config, image processor, tokenizer and chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

TOKENIZER = Path(__file__).parents[2] / "assets" / "tiny-base"
SIZES = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
QWEN3_VL_PROCESSOR = {**SIZES, "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}}
QWEN2_5_VL_PROCESSOR = {
    "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 3136, "max_pixels": 12_845_056,
}  # fmt: skip


def write_checkpoint(
    directory: Path,
    model_type: str,
    processor: dict[str, Any] | None,
    *,
    chat_template: str | None = None,
    nested: bool = False,
) -> Path:
    """Write the files.

    Args:
        directory: Created if missing.
        model_type: Of config.json.
        processor: Settings of the image processor; None writes no file.
        chat_template: None keeps that of the tiny model.
        nested: Write processor_config.json, as transformers 5 does, instead of preprocessor_config.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, directory / name)
    if chat_template is not None:
        (directory / "chat_template.jinja").write_text(chat_template)
    patch_size = (processor or SIZES).get("patch_size", 16)
    vision = {"patch_size": patch_size, "spatial_merge_size": 2}
    (directory / "config.json").write_text(json.dumps({"model_type": model_type, "vision_config": vision}))
    if processor is not None:
        settings = {"image_processor_type": "Qwen2VLImageProcessor", **processor}
        name, content = (
            ("processor_config.json", {"image_processor": settings})
            if nested
            else ("preprocessor_config.json", settings)
        )
        (directory / name).write_text(json.dumps(content))
    return directory
