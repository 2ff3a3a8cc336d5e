"""An image-text model of the CLIP family, from a checkpoint directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vz_ray.utils.errors import UserError
from vz_ray.video.frame import RGB
from vz_ray.video.frame_selection import Features


def check_image_text_checkpoint(directory: str) -> None:
    """`UserError` unless the directory holds a checkpoint with its processor and tokenizer."""
    path = Path(directory)
    for pattern in ("config.json", "*.safetensors", "*processor_config.json", "tokenizer*.json"):
        if not any(path.glob(pattern)):
            raise UserError(
                f"{directory} has no {pattern}; episode.selector.model must be the directory of a "
                "CLIP or SigLIP checkpoint"
            )


class ImageTextModel:
    """Features of images and texts in one space; the larger their product, the more alike.

    Any model that transformers' `AutoModel` loads with `get_image_features` and
    `get_text_features`. Texts longer than it can read are cut off.

    Args:
        directory: Checkpoint directory.
        device: Where it runs, as torch names it.
        batch: Images in one pass.

    Raises:
        UserError: There is no such checkpoint, or it is not of that family.
    """

    def __init__(self, directory: str, *, device: str = "cpu", batch_size: int = 32) -> None:
        from transformers import AutoModel, AutoProcessor

        check_image_text_checkpoint(directory)
        self._device, self._batch = device, batch_size
        try:
            model: Any = AutoModel.from_pretrained(directory, trust_remote_code=False, use_safetensors=True)
            self._processor: Any = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"cannot load the image-text model {directory}: {reason}") from error
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise UserError(
                f"{directory} holds a {type(model).__name__}, which does not compare images with texts; "
                "episode.selector.model must be a CLIP or SigLIP checkpoint"
            )
        self._model = model.to(device).eval()
        self._longest = int(model.config.text_config.max_position_embeddings)

    def encode_images(self, images: Sequence[RGB]) -> Features:
        """`[n, d]`, of unit length."""
        return np.concatenate(
            [
                # Copied: shared frames are read-only, which torch warns of.
                self._features(
                    "get_image_features", images=[*map(np.array, images[first : first + self._batch])]
                )
                for first in range(0, len(images), self._batch)
            ]
        )

    def encode_text(self, text: str) -> Features:
        """`[d]`, of unit length."""
        # SigLIP was trained on texts padded to its full length; CLIP does not look at padding.
        padded: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": self._longest}
        row: Features = self._features("get_text_features", text=[text], **padded)[0]
        return row

    def _features(self, method: str, **inputs: Any) -> Features:
        import torch

        tensors = self._processor(return_tensors="pt", **inputs).to(self._device)
        with torch.inference_mode():
            found = getattr(self._model, method)(**tensors)
            found = getattr(found, "pooler_output", found).float()
            features: Features = torch.nn.functional.normalize(found, dim=-1).cpu().numpy()
        return features
