"""Config of the frame selector, which chooses the frames of the overview."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vz_ray.config.fields import InvalidValueError, Section, choice, number
from vz_ray.config.timeouts import timeout

SELECTOR_KINDS = ("uniform", "count", "keyframes", "tspo", "query")
FUNCTION_PATTERN = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"
"""Regular expression (full match) of a user function."""


@dataclass
class FrameSelectorConfig(Section):
    """Selection of the overview's frames; `episode.overview_frames` is the maximum for every selector."""

    kind: str = "uniform"
    """`uniform`: frames at `overview_fps`; `count`: always `overview_frames` frames; `keyframes`: `uniform`,
    each frame moved to a near keyframe; `tspo`: frames of an index file; `query`: frames that an image-text
    model ranks by the question; or a user function `package.module:name`."""
    index_file: str = ""
    """TSPO index file (`TSPO_MLVU_frameIdx.json`) for `tspo`."""
    on_missing: str = choice("error", "uniform")
    """What `tspo` does with a question that is not in the file: `error`, or `uniform`, which is counted."""
    model: str = ""
    """Checkpoint directory of the image-text model (CLIP, SigLIP) for `query`."""
    candidate_fps: float = number(1.0, above=0)
    """Frame rate of the candidates of `query`."""
    max_candidates: int = number(512, minimum=1)
    """Maximum candidates of `query`; longer videos are sampled evenly."""
    max_candidate_pixels: int = number(50176, minimum=784)
    """Maximum area of a candidate in pixels; the model's processor resizes it to its own input size."""
    segment_share: float = number(0.25, minimum=0, maximum=1)
    """Share of the overview that `query` spreads evenly: the best frame of each of that many equal
    segments."""
    diversity: float = number(0.3, minimum=0, maximum=1)
    """Weight of difference between chosen frames: 0 ranks by the question only, 1 by difference only."""
    batch_size: int = number(32, minimum=1)
    """Frames per forward pass of the image-text model."""
    num_cpus: float = number(1.0, minimum=0)
    """CPUs that Ray reserves for the image-text model."""
    num_gpus: float = number(0.0, minimum=0)
    """GPUs, or a fraction of one, for the image-text model; 0 runs it on CPUs."""
    cache_mib: int = number(256, minimum=1)
    """Cache of image features in MiB; questions about the same video share them."""
    timeout_s: float = timeout("select_frames_s")
    """Timeout of one selection."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in SELECTOR_KINDS and re.fullmatch(FUNCTION_PATTERN, self.kind) is None:
            raise InvalidValueError(
                "kind",
                f"is {self.kind!r}; it must be one of {', '.join(SELECTOR_KINDS)}, or package.module:function",
            )
        for kind, key in (("tspo", "index_file"), ("query", "model")):
            if self.kind == kind and not getattr(self, key):
                raise InvalidValueError(key, f"is empty; kind {kind} requires it", "kind")
