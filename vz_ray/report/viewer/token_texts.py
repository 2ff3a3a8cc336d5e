"""What single tokens say: the logs hold ids, and the run's model knows their text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_LONGEST = 8
"""Most tokens that one character can be spread over."""


def find_tokenizer(model: str, run: Path) -> Tokenizer | None:
    """The tokenizer of a run's model; None where none is found or none can be read. Nothing is downloaded.

    Args:
        model: A directory, or a name that is looked for in the Hugging Face cache.
        run: The run directory, whose `models/` are looked into last.
    """
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cached = home / "hub" / f"models--{model.replace('/', '--')}" / "snapshots"
    candidates = [Path(model) / "tokenizer.json"] if model else []
    candidates += [*cached.glob("*/tokenizer.json"), *sorted((run / "models").glob("*/tokenizer.json"))]
    for path in candidates:
        if path.is_file():
            try:
                return Tokenizer.from_file(str(path))
            except Exception:  # The library raises this class itself, for whatever is wrong with the file.
                continue
    return None


def token_texts(tokenizer: Tokenizer | None, ids: Sequence[int], turn_text: str) -> list[str] | None:
    """The text of each token; None unless they spell `turn_text`, as those of another model would not.

    Bytes of one character that several tokens share are given to the last of them.

    Args:
        tokenizer: Of the model that sampled them.
        ids: `[T]`.
        turn_text: The turn as it was decoded when it was sampled.
    """
    if tokenizer is None:
        return None
    texts, begun = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[begun:end]), skip_special_tokens=False)
        if text.endswith(_UNFINISHED) and end - begun < _LONGEST and end < len(ids):
            texts.append("")
            continue
        texts.append(text)
        begun = end
    ended = "".join(texts[:-1])  # The end of the turn is a token of its own, and no part of what was said.
    return texts if turn_text.strip() in (ended.strip(), "".join(texts).strip()) else None
