"""Model families that can be trained, planned and served. A new family is one module and one entry here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vz_ray.families.family import TEXT_PREFIX, VISION_PREFIX, ModelFamily
from vz_ray.families.image_processor import ImageProcessorSettings, read_image_processor
from vz_ray.families.qwen2_5_vl import Qwen25VL
from vz_ray.families.qwen3_5 import Qwen35
from vz_ray.families.qwen3_vl import Qwen3VL
from vz_ray.families.qwen3_vl_moe import Qwen3VLMoe
from vz_ray.families.shape import ExpertsShape, LinearAttentionShape, ModelShape, TextShape, VisionShape
from vz_ray.utils.errors import UserError

FAMILIES: Mapping[str, ModelFamily] = {
    family.model_type: family for family in (Qwen25VL(), Qwen3VL(), Qwen3VLMoe(), Qwen35())
}
"""Supported families by `model_type` of config.json."""
_REFUSED = {"qwen3_5_moe": "the routing of its experts is not verified between transformers and vLLM"}
"""Why known families are not supported."""

__all__ = [
    "FAMILIES",
    "ImageProcessorSettings",
    "TEXT_PREFIX",
    "VISION_PREFIX",
    "ExpertsShape",
    "LinearAttentionShape",
    "ModelFamily",
    "ModelShape",
    "TextShape",
    "VisionShape",
    "family_of",
    "load_family",
    "load_hf_config",
    "load_model_shape",
    "model_shape",
    "processor_max_pixels",
]


def family_of(model_type: str, source: str = "the model") -> ModelFamily:
    """Return the family of a `model_type` of config.json.

    Raises:
        UserError: The family is not supported. `source` names the model.
    """
    if model_type not in FAMILIES:
        reason = f" ({_REFUSED[model_type]})" if model_type in _REFUSED else ""
        supported = ", ".join(f"{family.model_type} ({family.name})" for family in FAMILIES.values())
        raise UserError(f"model_type of {source} is {model_type!r}{reason}; supported: {supported}")
    return FAMILIES[model_type]


def load_family(directory: str | Path) -> ModelFamily:
    """Return the family of a checkpoint directory; reads config.json only.

    Raises:
        UserError: config.json is missing or invalid, or the family is not supported.
    """
    file = Path(directory) / "config.json"
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"model {str(directory)!r} has no config.json. Pass an HF checkpoint directory.") from None
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}. Download it again.") from error
    return family_of(str(content.get("model_type", "")), f"model {str(directory)!r}")


def load_hf_config(directory: str | Path) -> Any:
    """Load the HF config of a checkpoint directory and check that its variant is supported.

    Raises:
        UserError: transformers rejects the config; see also `load_family` and `ModelFamily.check_config`.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    family = load_family(directory)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{family.name}: config.json of {str(directory)!r} is not valid: {reason}") from error
    family.check_config(config)
    return config


def model_shape(config: Any) -> ModelShape:
    """Return the shape of a model from its HF config.

    Raises:
        UserError: The family is not supported.
    """
    return family_of(config.model_type).read_shape(config)


def load_model_shape(model: str) -> ModelShape:
    """Load the shape of a checkpoint directory (weights not required) or a known name like Qwen3-VL-8B.

    Raises:
        UserError: `model` is neither a directory with a config.json nor a known name, or the model is not
            supported.
    """
    path = Path(model)
    if model and (path / "config.json").is_file():
        return model_shape(load_hf_config(path))
    family, name = _find_known(path.name)
    if family is not None:
        return family.known_shapes[name]
    problem = f"model is {model!r}, which has no config.json" if model else "model is not set"
    names = " or ".join(f"model={name}" for family in FAMILIES.values() for name in family.known_shapes)
    raise UserError(f"{problem}; set it to a checkpoint directory or a known name: {names}")


def processor_max_pixels(model: str) -> int:
    """Return the maximum image area of a checkpoint's processor, in pixels.

    Args:
        model: Checkpoint directory or known name. Without a processor config, the family's default is used,
            and Qwen2.5-VL's for an unknown name.
    """
    _, settings = read_image_processor(model) if model else (None, {})
    if max_pixels := settings.get("max_pixels"):
        return int(max_pixels)
    family, _ = _find_known(Path(model).name)
    return (family or FAMILIES["qwen2_5_vl"]).processor_max_pixels


def _find_known(model: str) -> tuple[ModelFamily | None, str]:
    """Return family and name of a known architecture, also with a suffix like -Instruct."""
    for family in FAMILIES.values():
        for name in family.known_shapes:
            if re.fullmatch(rf"{re.escape(name)}(-Instruct|-Thinking)?", model, flags=re.IGNORECASE):
                return family, name
    return None, ""
