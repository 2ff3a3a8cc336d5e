"""Which frames the overview shows, and who chooses them."""

from __future__ import annotations

import re
from dataclasses import dataclass

SELECTOR_KINDS = ("uniform", "count", "keyframes", "tspo", "query")
FUNCTION_PATTERN = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"
"""A function of one's own; a regular expression of the whole."""
ON_MISSING = ("error", "uniform")


@dataclass
class FrameSelectorConfig:
    """The overview's frames; `episode.overview_frames` is the most that any selector shows."""

    kind: str = "uniform"
    """`uniform`: by `overview_fps`; `count`: always `overview_frames` of them; `keyframes`: `uniform`, each
    frame moved to a keyframe near it; `tspo`: those of an index file; `query`: those that an image-text
    model finds like the question; or `package.module:function`, a function of your own."""
    index_file: str = ""
    """The TSPO index file (`TSPO_MLVU_frameIdx.json`) of `tspo`."""
    on_missing: str = "error"
    """What `tspo` does with a question that its file lacks: `error`, or `uniform`, which is counted."""
    model: str = ""
    """Checkpoint directory of the image-text model (CLIP, SigLIP) of `query`."""
    candidate_fps: float = 1.0
    """Rate of the frames that `query` chooses from."""
    max_candidates: int = 512
    """Most frames that `query` chooses from; longer videos spread them evenly."""
    max_candidate_pixels: int = 50176
    """Largest area of these, pixels; the model's processor scales them to its own size."""
    segment_share: float = 0.25
    """Share of the overview that `query` spreads: of so many equal parts of the video the best frame each."""
    diversity: float = 0.3
    """How much `query` minds showing the same twice: 0 goes by the question alone, 1 by difference alone."""
    batch_size: int = 32
    """Frames that the image-text model looks at in one pass."""
    num_cpus: float = 1.0
    """CPUs that Ray reserves for the image-text model."""
    num_gpus: float = 0.0
    """GPUs, or the share of one, for it; 0 runs it on CPUs."""
    cache_mib: int = 256
    """Features of videos that it keeps, MB; a video's questions share them."""
    timeout_s: float = 120.0
    """Seconds that choosing an overview's frames may take."""

    def __post_init__(self) -> None:
        if self.kind not in SELECTOR_KINDS and re.fullmatch(FUNCTION_PATTERN, self.kind) is None:
            raise ValueError(
                f"episode.selector.kind is {self.kind!r}; it must be one of {', '.join(SELECTOR_KINDS)}, "
                "or package.module:function"
            )
        if self.on_missing not in ON_MISSING:
            raise ValueError(
                f"episode.selector.on_missing is {self.on_missing!r}; it must be one of {', '.join(ON_MISSING)}"
            )
        for kind, key in (("tspo", "index_file"), ("query", "model")):
            if self.kind == kind and not getattr(self, key):
                raise ValueError(f"episode.selector.{key} is empty; episode.selector.kind {kind} needs it")
        for name in ("candidate_fps", "timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"episode.selector.{name} is {getattr(self, name)}; it must be above 0")
        for name in ("max_candidates", "batch_size", "cache_mib"):
            if getattr(self, name) < 1:
                raise ValueError(f"episode.selector.{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_candidate_pixels < 784:
            raise ValueError(
                f"episode.selector.max_candidate_pixels is {self.max_candidate_pixels}; it must be at least 784"
            )
        for name in ("segment_share", "diversity"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"episode.selector.{name} is {getattr(self, name)}; it is a share from 0 to 1"
                )
        for name in ("num_cpus", "num_gpus"):
            if getattr(self, name) < 0:
                raise ValueError(f"episode.selector.{name} is {getattr(self, name)}; it must not be negative")
