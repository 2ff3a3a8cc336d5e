"""Parity probe: a fixed prompt with images, scored by learner and engine to verify a publish.

Engines pack, fuse and shard tensors, so tensors cannot be compared directly; log-probs can. One probe
detects stale embeddings, stale caches and wrong name mappings.

    first publish   an engine continues the prompt greedily; the probe scores this continuation from now on
                    the gap must be below a ceiling for the dtype, and calibrates the tolerance
    later           the gap must be below a multiple of the calibrated gap, with a floor for the dtype
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from vz_ray.utils.atomic_files import write_atomic
from vz_ray.video.frame import Frame, FrameRef
from vz_ray.weight_sync.weight_store import WeightIntegrityError
from vz_ray.weight_sync.weight_version import ProbeScore

log = logging.getLogger(__name__)

PROBE_TOKENS = 16
"""Number of scored tokens."""
_WORDS_PER_IMAGE = 60
_GAP_MULTIPLE = 5.0
"""Tolerance after the calibration, as a multiple of the calibrated gap."""
_GAP_RANGES = {"float32": (1e-4, 1e-4), "float16": (0.005, 0.05), "bfloat16": (0.03, 0.15)}
"""Floor and ceiling of the tolerance for each dtype of the engine. One bfloat16 step of a logit in 16..32 is 0.125."""


@dataclass(frozen=True, slots=True)
class ParityProbe:
    """A prompt and its continuation.

    Attributes:
        compact_ids: Prompt with one image pad per image.
        expanded_ids: Prompt with one image pad per visual token.
        frames: Noise images of different sizes, which the model's image processor does not resize.
        token_ids: `[T]`, tokens to score.
    """

    compact_ids: tuple[int, ...]
    expanded_ids: tuple[int, ...]
    frames: tuple[Frame, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ProbeGap:
    """Difference between an engine and the learner.

    Attributes:
        mean: Mean absolute log-prob difference.
        kl: k3 estimate of the KL divergence per token.
    """

    mean: float
    kl: float


def build_parity_probe(
    tokenizer: Any, image_processor: Any, *, num_tokens: int = PROBE_TOKENS, seed: int = 0
) -> ParityProbe:
    """Build the probe for a Qwen-VL checkpoint: three noise images, random text, and `num_tokens` random tokens.

    The text is longer than a block of the prefix cache, so that a stale cache is detected.
    """
    rng = np.random.default_rng(seed)
    start, pad, end = (
        tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "image_pad", "vision_end")
    )
    plain = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    frames: list[Frame] = []
    compact: list[int] = []
    expanded: list[int] = []
    side = image_processor.patch_size * image_processor.merge_size
    for columns, rows in _image_shapes(
        side, image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
    ):
        rgb = rng.integers(0, 256, (rows * side, columns * side, 3), dtype=np.uint8)
        digest = blake3(rgb.tobytes()).hexdigest()
        ref = FrameRef("probe", "", 0, float(len(frames)), rgb.shape[1], rgb.shape[0], "none", "none", digest)
        frames.append(Frame(ref, rgb))
        words = [int(i) for i in rng.choice(plain, _WORDS_PER_IMAGE)]
        compact += [*words, start, pad, end]
        expanded += [*words, start, *[pad] * (columns * rows), end]
    scored = tuple(int(i) for i in rng.choice(plain, num_tokens))
    return ParityProbe(tuple(compact), tuple(expanded), tuple(frames), scored)


def _image_shapes(side: int, min_pixels: int, max_pixels: int) -> list[tuple[int, int]]:
    """Return columns and rows of each image in visual tokens, within the processor's bounds on the area."""
    shortest = math.isqrt(max(1, math.ceil(min_pixels / side**2)) - 1) + 1
    shapes = [(shortest + 1, shortest), (shortest + 2, shortest + 1), (shortest, shortest + 3)]
    fitting = [shape for shape in shapes if shape[0] * shape[1] * side**2 <= max_pixels]
    return fitting or [(shortest, shortest)]


class ParityCheck:
    """Compare engines with the learner, with a tolerance that is calibrated at the first publish.

    Args:
        probe: The probe. Its tokens are replaced by an engine's greedy continuation; see `continue_with`.
        dtype: Dtype of the engines.
        max_gap: Ceiling of the tolerance on the mean log-prob gap; default: by dtype.
        file: Keeps continuation and calibration, so that a resumed run uses the same; None keeps nothing.

    Attributes:
        probe: The probe with its current tokens.
        is_continued: Whether the probe's tokens are an engine's continuation.
        max_gap: Current tolerance on the mean log-prob gap.
    """

    def __init__(
        self, probe: ParityProbe, *, dtype: str = "float32", max_gap: float | None = None, file: Path | None = None
    ) -> None:
        floor, ceiling = _GAP_RANGES[dtype]
        self.max_gap = ceiling if max_gap is None else max_gap
        self.probe, self.is_continued = probe, False
        self._floor, self._dtype, self._file = min(floor, self.max_gap), dtype, file
        self._calibrated_gap: float | None = None
        if file is not None and file.is_file():
            self._load(json.loads(file.read_text()))

    def continue_with(self, token_ids: Sequence[int]) -> None:
        """Score this continuation from now on. A likely continuation has small rounding errors."""
        self.probe = replace(self.probe, token_ids=tuple(token_ids))
        self.is_continued = True

    def compare(self, worker_name: str, version: int, expected: ProbeScore, actual: ProbeScore) -> ProbeGap:
        """Return the gap of an engine.

        Raises:
            WeightIntegrityError: The engine's prompt has another length, or the gap exceeds the tolerance.
        """
        failure = f"{worker_name} failed the parity probe of weight version {version}: "
        if actual.num_prompt_tokens != expected.num_prompt_tokens:
            raise WeightIntegrityError(
                f"{failure}its prompt has {actual.num_prompt_tokens} tokens and the learner's "
                f"{expected.num_prompt_tokens}; their image processors resize images differently"
            )
        differences = np.asarray(expected.logprobs) - np.asarray(actual.logprobs)
        gap = ProbeGap(
            float(np.abs(differences).mean()), float(np.mean(np.expm1(np.clip(differences, None, 50)) - differences))
        )
        # The KL of normally distributed differences is below their mean square. It grows with a few large ones.
        max_kl = 4 * self.max_gap**2
        if not (gap.mean <= self.max_gap and gap.kl <= max_kl):
            raise WeightIntegrityError(
                f"{failure}its log-probs differ from the learner's by {gap.mean:.3g} on average, with a KL of "
                f"{gap.kl:.3g} per token; the maxima are {self.max_gap:.3g} and {max_kl:.3g} "
                "(weights.probe_tolerance limits the first)"
            )
        return gap

    def calibrate(self, gap: ProbeGap) -> None:
        """Set the tolerance from the largest gap of the first publish, and write it to the file."""
        if self._calibrated_gap is not None:
            return
        self._set_gap(gap.mean)
        log.info("Calibrated the parity probe: gap %.3g, tolerance %.3g", gap.mean, self.max_gap)
        if self._file is not None:
            content = {"dtype": self._dtype, "token_ids": self.probe.token_ids, "calibrated_gap": gap.mean}
            write_atomic(self._file, json.dumps(content).encode())

    def _set_gap(self, gap: float) -> None:
        self._calibrated_gap = gap
        self.max_gap = min(self.max_gap, max(self._floor, _GAP_MULTIPLE * gap))

    def _load(self, content: dict[str, Any]) -> None:
        if content["dtype"] == self._dtype and len(content["token_ids"]) == len(self.probe.token_ids):
            self.continue_with(content["token_ids"])
            self._set_gap(content["calibrated_gap"])
