"""The zoom gate: answer first, and zoom only where that answer is uncertain."""

from __future__ import annotations

from dataclasses import dataclass

ZOOM_GATE_MODES = ("off", "measure", "on")


@dataclass
class ZoomGateConfig:
    """Whether an episode may zoom is decided by a short draft of its answer; for evaluation and serving."""

    mode: str = "off"
    """`off`: every episode may zoom; `measure`: so it may, and the draft is noted, to calibrate on;
    `on`: only where the draft is uncertain, else the draft is the answer."""
    thresholds_file: str = ""
    """Thresholds, as `vz-ray calibrate-gate` writes them."""
    threshold: float | None = None
    """One threshold for all, in place of a file: an episode zooms above this uncertainty, from 0 to 1."""
    draft_prefix: str = "<think></think><answer>"
    """What the draft's turn begins with, in place of reasoning."""
    max_draft_tokens: int = 32
    """Most tokens of a draft; one that has not ended by then counts as uncertain."""

    def __post_init__(self) -> None:
        # YAML reads `on` and `off` without quotes as true and false.
        self.mode = {"True": "on", "False": "off"}.get(self.mode, self.mode)
        if self.mode not in ZOOM_GATE_MODES:
            raise ValueError(
                f"episode.gate.mode is {self.mode!r}; it must be one of {', '.join(ZOOM_GATE_MODES)}"
            )
        if self.mode == "on" and bool(self.thresholds_file) == (self.threshold is not None):
            raise ValueError(
                f"episode.gate.thresholds_file is {self.thresholds_file!r} and threshold {self.threshold}; "
                "episode.gate.mode on needs one of the two"
            )
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"episode.gate.threshold is {self.threshold}; it lies between 0 and 1")
        if not self.draft_prefix.endswith("<answer>"):
            raise ValueError(f"episode.gate.draft_prefix is {self.draft_prefix!r}; it must end with <answer>")
        if self.max_draft_tokens < 1:
            raise ValueError(
                f"episode.gate.max_draft_tokens is {self.max_draft_tokens}; it must be at least 1"
            )
