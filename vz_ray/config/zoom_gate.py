"""Config of the zoom gate: draft an answer first and zoom only if the draft is uncertain."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.validation import InvalidValueError, check_choice, check_fraction, check_min

ZOOM_GATE_MODES = ("off", "measure", "on")


@dataclass
class ZoomGateConfig:
    """A short draft answer decides if an episode may zoom; for evaluation and serving."""

    mode: str = "off"
    """`off`: every episode may zoom; `measure`: same, and the draft is recorded for calibration; `on`: an
    episode zooms only if the draft is uncertain, else the draft is its answer."""
    thresholds_file: str = ""
    """File of thresholds from `vz-ray calibrate-gate`."""
    threshold: float | None = None
    """One threshold instead of a file: an episode zooms above this uncertainty, from 0 to 1."""
    draft_prefix: str = "<think></think><answer>"
    """Start of the draft turn; it replaces the reasoning."""
    max_draft_tokens: int = 32
    """Maximum tokens of a draft; a longer draft counts as uncertain."""

    def __post_init__(self) -> None:
        # YAML reads unquoted `on` and `off` as true and false.
        self.mode = {"True": "on", "False": "off"}.get(self.mode, self.mode)
        check_choice(self, "mode", ZOOM_GATE_MODES)
        if self.mode == "on" and bool(self.thresholds_file) == (self.threshold is not None):
            raise InvalidValueError(
                "thresholds_file",
                f"is {self.thresholds_file!r} and threshold is {self.threshold}; with mode 'on' set exactly one",
                "threshold",
                "mode",
            )
        if self.threshold is not None:
            check_fraction(self, "threshold")
        if not self.draft_prefix.endswith("<answer>"):
            raise InvalidValueError("draft_prefix", f"is {self.draft_prefix!r}; it must end with <answer>")
        check_min(self, 1, "max_draft_tokens")
