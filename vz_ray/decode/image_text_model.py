"""Image-text model of the CLIP family, loaded from a checkpoint directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vz_ray.utils.errors import UserError
from vz_ray.video.frame import RGB
from vz_ray.video.frame_selection import Features


def check_image_text_checkpoint(directory: str) -> None:
    """Raise `UserError` if the directory lacks model, processor or tokenizer files."""
    path = Path(directory)
    for pattern in ("config.json", "*.safetensors", "*processor_config.json", "tokenizer*.json"):
        if not any(path.glob(pattern)):
            raise UserError(
                f"{directory} has no {pattern}; episode.selector.model must be the directory of a "
                "CLIP or SigLIP checkpoint"
            )


class ImageTextModel:
    """Image and text features in a shared space. A larger dot product means more similar.

    Supports every model that `AutoModel` loads with `get_image_features` and `get_text_features`.
    Long texts are truncated.

    Args:
        batch_size: Images per forward pass.

    Raises:
        UserError: The checkpoint is missing or of another model family.
    """

    def __init__(self, directory: str, *, device: str = "cpu", batch_size: int = 32) -> None:
        from transformers import AutoModel, AutoProcessor

        check_image_text_checkpoint(directory)
        self._device, self._batch_size = device, batch_size
        try:
            model: Any = AutoModel.from_pretrained(directory, trust_remote_code=False, use_safetensors=True)
            self._processor: Any = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"cannot load the image-text model {directory}: {reason}") from error
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise UserError(
                f"{directory} contains a {type(model).__name__}, which has no image and text features; "
                "episode.selector.model must be a CLIP or SigLIP checkpoint"
            )
        self._model = model.to(device).eval()
        self._max_text_tokens = int(model.config.text_config.max_position_embeddings)

    def encode_images(self, images: Sequence[RGB]) -> Features:
        """Return normalized features `[n, d]`."""
        return np.concatenate(
            [
                # Copies, because torch warns about read-only arrays.
                self._features("get_image_features", images=[*map(np.array, images[start : start + self._batch_size])])
                for start in range(0, len(images), self._batch_size)
            ]
        )

    def encode_text(self, text: str) -> Features:
        """Return the normalized feature `[d]`."""
        # SigLIP was trained on texts padded to the maximum length; CLIP ignores padding.
        padding: dict[str, Any] = {
            "padding": "max_length",
            "truncation": True,
            "max_length": self._max_text_tokens,
        }
        row: Features = self._features("get_text_features", text=[text], **padding)[0]
        return row

    def _features(self, method: str, **inputs: Any) -> Features:
        import torch

        tensors = self._processor(return_tensors="pt", **inputs).to(self._device)
        with torch.inference_mode():
            output = getattr(self._model, method)(**tensors)
            pooled = getattr(output, "pooler_output", output).float()
            features: Features = torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()
        return features
