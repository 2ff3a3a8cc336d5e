"""Parity probe: a fixed prompt with images, scored by learner and engine to verify a publish.

Engines pack, fuse and shard tensors, so tensors cannot be compared directly; log-probs can. One probe
detects stale embeddings, stale caches and wrong name mappings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray

from vz_ray.weight_sync.weight_store import WeightIntegrityError

PROBE_IMAGE_SIZES = ((56, 28), (84, 56), (28, 112))
"""(width, height) of the probe's images, pixels."""

_SIDE = 28


@dataclass(frozen=True, slots=True)
class ParityProbe:
    """A prompt and its continuation.

    Attributes:
        compact_ids: Prompt with one image pad per image.
        expanded_ids: Prompt with one image pad per visual token.
        images: `uint8[height, width, 3]` each, of different sizes.
        token_ids: `[T]`, tokens to score.
        pad_id: Token id of the image pad.
    """

    compact_ids: tuple[int, ...]
    expanded_ids: tuple[int, ...]
    images: tuple[NDArray[np.uint8], ...]
    token_ids: tuple[int, ...]
    pad_id: int

    def digests(self) -> tuple[str, ...]:
        """Return the blake3 of each image, hex."""
        return tuple(blake3(image.tobytes()).hexdigest() for image in self.images)


def build_parity_probe(tokenizer: Any, *, num_tokens: int = 8, seed: int = 0) -> ParityProbe:
    """Build the probe for a Qwen-VL tokenizer: three noise images, text, and `num_tokens` to score.

    The text is longer than a block of the prefix cache, so that a stale cache is detected.
    """
    rng = np.random.default_rng(seed)
    start, pad, end = (
        tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "image_pad", "vision_end")
    )
    plain = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    images = tuple(rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in PROBE_IMAGE_SIZES)
    compact: list[int] = []
    expanded: list[int] = []
    for image in images:
        words = [int(i) for i in rng.choice(plain, 60)]
        visual = image.shape[0] * image.shape[1] // _SIDE**2
        compact += [*words, start, pad, end]
        expanded += [*words, start, *[pad] * visual, end]
    scored = tuple(int(i) for i in rng.choice(plain, num_tokens))
    return ParityProbe(tuple(compact), tuple(expanded), images, scored, pad)


@torch.no_grad()
def compute_learner_logprobs(
    model: Any, image_processor: Any, probe: ParityProbe, banned_token_ids: Sequence[int]
) -> tuple[float, ...]:
    """Compute the learner's log-probs `[T]` of the probe's tokens at temperature 1.

    Args:
        model: HF Qwen-VL model or its DeepSpeed engine. Under ZeRO-3, every rank must call.
        image_processor: HF image processor of the model.
        probe: The probe.
        banned_token_ids: Token ids that the engines never sample.
    """
    device = next(iter(model.parameters())).device
    ids = torch.tensor([[*probe.expanded_ids, *probe.token_ids]], device=device)
    inputs = image_processor(images=list(probe.images), return_tensors="pt").to(device)
    output = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == probe.pad_id).long(),
        use_cache=False,
        **inputs,
    )
    count = len(probe.token_ids)
    logits = output.logits[0, -count - 1 : -1].float()
    logits[:, list(banned_token_ids)] = float("-inf")
    scored = torch.log_softmax(logits, dim=-1).gather(-1, ids[0, -count:, None])
    return tuple(scored[:, 0].tolist())


def check_parity(
    worker_name: str, version: int, expected: Sequence[float], actual: Sequence[float], tolerance: float
) -> float:
    """Return the largest log-prob difference.

    Raises:
        WeightIntegrityError: The difference exceeds `tolerance` or is NaN.
    """
    diffs = [abs(a - b) for a, b in zip(expected, actual, strict=True)]
    if not all(diff <= tolerance for diff in diffs):
        raise WeightIntegrityError(
            f"{worker_name} failed the parity probe of weight version {version}: its log-probs differ from "
            f"the learner's by {max(diffs):.3g}; the maximum is weights.probe_tolerance ({tolerance:g})"
        )
    return max(diffs)
