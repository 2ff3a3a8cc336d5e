"""The zoom gate: answer first, and zoom only where that answer is uncertain."""

from __future__ import annotations

from dataclasses import dataclass

MODES = ("off", "measure", "on")


@dataclass
class GateConfig:
    """Whether an episode may zoom is decided by a short draft of its answer; for evaluation and serving."""

    mode: str = "off"
    """`off`: every episode may zoom; `measure`: so it may, and the draft is noted, to calibrate on;
    `on`: only where the draft is uncertain, else the draft is the answer."""
    file: str = ""
    """Thresholds, as `vz-ray calibrate-gate` writes them."""
    threshold: float | None = None
    """One threshold for all, in place of a file: an episode zooms above this uncertainty, from 0 to 1."""
    prefix: str = "<think></think><answer>"
    """What the draft's turn begins with, in place of reasoning."""
    max_tokens: int = 32
    """Most tokens of a draft; one that has not ended by then counts as uncertain."""

    def __post_init__(self) -> None:
        # YAML reads `on` and `off` without quotes as true and false.
        self.mode = {"True": "on", "False": "off"}.get(self.mode, self.mode)
        if self.mode not in MODES:
            raise ValueError(f"episode.gate.mode is {self.mode!r}; it must be one of {', '.join(MODES)}")
        if self.mode == "on" and bool(self.file) == (self.threshold is not None):
            raise ValueError(
                f"episode.gate.file is {self.file!r} and threshold {self.threshold}; "
                "episode.gate.mode on needs one of the two"
            )
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"episode.gate.threshold is {self.threshold}; it lies between 0 and 1")
        if not self.prefix.endswith("<answer>"):
            raise ValueError(f"episode.gate.prefix is {self.prefix!r}; it must end with <answer>")
        if self.max_tokens < 1:
            raise ValueError(f"episode.gate.max_tokens is {self.max_tokens}; it must be at least 1")
