"""Sentence embeddings: mean of a text model's last hidden states, as in `all-MiniLM-L6-v2`."""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from vz_ray.utils.errors import UserError

MAX_TOKENS = 256
"""Maximum tokens of a text; longer texts are truncated (source: all-MiniLM-L6-v2)."""


class SentenceEmbedder:
    """Sentence-embedding model, loaded from a folder on first use.

    Raises:
        UserError: The folder has no model.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise UserError(
                f"no sentence-embedding model at {folder}: config.json is missing; set `embedding_model` to "
                "the folder of a model such as all-MiniLM-L6-v2"
            )
        self.folder = folder
        self._embedding = lru_cache(maxsize=4096)(self._embed)

    def cosine_similarity(self, text: str, other: str) -> float:
        """Return the cosine similarity of two texts, -1 to 1."""
        return float(self._embedding(text) @ self._embedding(other))

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(self.folder), trust_remote_code=False)
        model = AutoModel.from_pretrained(str(self.folder), trust_remote_code=False, use_safetensors=True)
        return tokenizer, model.eval()

    def _embed(self, text: str) -> Any:
        """Return the embedding as a unit vector `[D]`."""
        import torch

        tokenizer, model = self._model
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=MAX_TOKENS)
        with torch.no_grad():
            hidden = model(**tokens).last_hidden_state[0]
        mask = tokens["attention_mask"][0].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(0) / mask.sum(), dim=0)
