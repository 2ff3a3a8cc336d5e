"""Text of single tokens, decoded with the tokenizer of the run's model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_LONGEST = 8
"""Maximum number of tokens per character."""


def find_tokenizer(model: str, run: Path) -> Tokenizer | None:
    """Return the tokenizer of a run's model; None if it is missing or invalid. Never downloads.

    Args:
        model: Directory, or a name in the Hugging Face cache.
        run: Run directory; its `models/` are searched last.
    """
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cached = home / "hub" / f"models--{model.replace('/', '--')}" / "snapshots"
    candidates = [Path(model) / "tokenizer.json"] if model else []
    candidates += [*cached.glob("*/tokenizer.json"), *sorted((run / "models").glob("*/tokenizer.json"))]
    for path in candidates:
        if path.is_file():
            try:
                return Tokenizer.from_file(str(path))
            except Exception:  # the library raises this class for all errors
                continue
    return None


def token_texts(tokenizer: Tokenizer | None, ids: Sequence[int], turn_text: str) -> list[str] | None:
    """Return the text of each token; None if they do not spell `turn_text`, as with another model's tokenizer.

    A character split over several tokens is assigned to the last of them.

    Args:
        tokenizer: Tokenizer of the model that sampled the tokens.
        ids: Token ids `[T]`.
        turn_text: Text of the turn.
    """
    if tokenizer is None:
        return None
    texts, start = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[start:end]), skip_special_tokens=False)
        if text.endswith(_UNFINISHED) and end - start < _LONGEST and end < len(ids):
            texts.append("")
            continue
        texts.append(text)
        start = end
    without_end = "".join(texts[:-1])  # the end-of-turn token is not part of the text
    return texts if turn_text.strip() in (without_end.strip(), "".join(texts).strip()) else None
