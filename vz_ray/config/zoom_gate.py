"""Config of the zoom gate: draft an answer first and zoom only if the draft is uncertain."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.fields import InvalidValueError, Section, choice, number


@dataclass
class ZoomGateConfig(Section):
    """A short draft answer decides if an episode may zoom; for evaluation and serving."""

    mode: str = choice("off", "measure", "on")
    """`off`: every episode may zoom; `measure`: same, and the draft is recorded for calibration; `on`: an
    episode zooms only if the draft is uncertain, else the draft is its answer."""
    thresholds_file: str = ""
    """File of thresholds from `vz-ray calibrate-gate`."""
    threshold: float | None = number(None, minimum=0, maximum=1)
    """One threshold instead of a file: an episode zooms above this uncertainty, from 0 to 1."""
    draft_prefix: str = "<think></think><answer>"
    """Start of the draft turn; it replaces the reasoning."""
    max_draft_tokens: int = number(32, minimum=1)
    """Maximum tokens of a draft; a longer draft counts as uncertain."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "on" and bool(self.thresholds_file) == (self.threshold is not None):
            raise InvalidValueError(
                "thresholds_file",
                f"is {self.thresholds_file!r} and threshold is {self.threshold}; with mode 'on' set exactly one",
                "threshold",
                "mode",
            )
        if not self.draft_prefix.endswith("<answer>"):
            raise InvalidValueError("draft_prefix", f"is {self.draft_prefix!r}; it must end with <answer>")
