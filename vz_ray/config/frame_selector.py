"""Config of the frame selector, which chooses the frames of the overview."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vz_ray.config.derived import timeout
from vz_ray.config.validation import (
    InvalidValueError,
    check_choice,
    check_fraction,
    check_min,
    check_not_negative,
    check_positive,
)

SELECTOR_KINDS = ("uniform", "count", "keyframes", "tspo", "query")
FUNCTION_PATTERN = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"
"""Regular expression (full match) of a user function."""
ON_MISSING = ("error", "uniform")


@dataclass
class FrameSelectorConfig:
    """Selection of the overview's frames; `episode.overview_frames` is the maximum for every selector."""

    kind: str = "uniform"
    """`uniform`: frames at `overview_fps`; `count`: always `overview_frames` frames; `keyframes`: `uniform`,
    each frame moved to a near keyframe; `tspo`: frames of an index file; `query`: frames that an image-text
    model ranks by the question; or a user function `package.module:name`."""
    index_file: str = ""
    """TSPO index file (`TSPO_MLVU_frameIdx.json`) for `tspo`."""
    on_missing: str = "error"
    """What `tspo` does with a question that is not in the file: `error`, or `uniform`, which is counted."""
    model: str = ""
    """Checkpoint directory of the image-text model (CLIP, SigLIP) for `query`."""
    candidate_fps: float = 1.0
    """Frame rate of the candidates of `query`."""
    max_candidates: int = 512
    """Maximum candidates of `query`; longer videos are sampled evenly."""
    max_candidate_pixels: int = 50176
    """Maximum area of a candidate in pixels; the model's processor resizes it to its own input size."""
    segment_share: float = 0.25
    """Share of the overview that `query` spreads evenly: the best frame of each of that many equal
    segments."""
    diversity: float = 0.3
    """Weight of difference between chosen frames: 0 ranks by the question only, 1 by difference only."""
    batch_size: int = 32
    """Frames per forward pass of the image-text model."""
    num_cpus: float = 1.0
    """CPUs that Ray reserves for the image-text model."""
    num_gpus: float = 0.0
    """GPUs, or a fraction of one, for the image-text model; 0 runs it on CPUs."""
    cache_mib: int = 256
    """Cache of image features in MiB; questions about the same video share them."""
    timeout_s: float = timeout("select_frames_s")
    """Timeout of one selection."""

    def __post_init__(self) -> None:
        if self.kind not in SELECTOR_KINDS and re.fullmatch(FUNCTION_PATTERN, self.kind) is None:
            raise InvalidValueError(
                "kind",
                f"is {self.kind!r}; it must be one of {', '.join(SELECTOR_KINDS)}, or package.module:function",
            )
        check_choice(self, "on_missing", ON_MISSING)
        for kind, key in (("tspo", "index_file"), ("query", "model")):
            if self.kind == kind and not getattr(self, key):
                raise InvalidValueError(key, f"is empty; kind {kind} requires it", "kind")
        check_positive(self, "candidate_fps")
        check_min(self, 1, "max_candidates", "batch_size", "cache_mib")
        check_min(self, 784, "max_candidate_pixels")
        check_fraction(self, "segment_share", "diversity")
        check_not_negative(self, "num_cpus", "num_gpus")
