"""Modes of an evaluation: the zooming agent with a zoom limit, or uniform frames without the tool."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from vz_ray.config.episode import EpisodeConfig, uniform_frames_config

AGENT, UNIFORM = "agent", "uniform"
MAIN_MODEL = "model"
"""Label of the run's `model`, the default of a mode."""
_MODE = re.compile(r"(?:(?P<model>[^/]+)/)?(?P<kind>\w+)(?::(?P<limit>\d+))?(?:@(?P<fps>[\d.]+)fps)?")


@dataclass(frozen=True, slots=True)
class EvalMode:
    """Mode of an evaluation.

    Attributes:
        kind: `agent` or `uniform`.
        limit: Maximum zooms of the agent (default: from the episode config), or number of uniform frames.
        fps: Frame rate of every zoom; None uses the rate that the agent requests.
        model: Label of the checkpoint.

    Example: `agent`, `agent:2`, `agent@0.5fps`, `uniform:32`, `sft/agent:2`
    """

    kind: str
    limit: int | None = None
    fps: float | None = None
    model: str = MAIN_MODEL

    @classmethod
    def parse(cls, text: str) -> EvalMode:
        """Parse a mode from a validated config, or the output of `str(mode)`.

        Raises:
            ValueError: `text` has another format.
        """
        match = _MODE.fullmatch(text)
        if match is None:
            raise ValueError(f"mode is {text!r}; it must look like agent, agent:2, agent@0.5fps or uniform:32")
        limit, fps = match["limit"], match["fps"]
        return cls(
            kind=match["kind"],
            limit=int(limit) if limit else None,
            fps=float(fps) if fps else None,
            model=match["model"] or MAIN_MODEL,
        )

    def __str__(self) -> str:
        prefix = "" if self.model == MAIN_MODEL else f"{self.model}/"
        limit = "" if self.limit is None else f":{self.limit}"
        return f"{prefix}{self.kind}{limit}" + ("" if self.fps is None else f"@{self.fps:g}fps")

    @property
    def stage(self) -> str:
        """Name for files: `agent`, `agent_2`, `agent_0.5fps`, `uniform_32`, `sft_agent_2`."""
        return re.sub("[/:@]", "_", str(self))

    @property
    def title(self) -> str:
        """Name for tables and notes."""
        prefix = "" if self.model == MAIN_MODEL else f"{self.model}: "
        if self.kind == UNIFORM:
            return f"{prefix}uniform, {self.limit} frames"
        limit = "" if self.limit is None else f", zooms <= {self.limit}"
        return f"{prefix}agent{limit}" + ("" if self.fps is None else f", zooms at {self.fps:g} fps")

    def episode_config(self, config: EpisodeConfig, uniform_prompt: str) -> EpisodeConfig:
        """Return `config` with the limits and the prompt of this mode."""
        if self.kind == UNIFORM:
            return replace(uniform_frames_config(config, self.limit or 1), prompt=uniform_prompt)
        max_rounds = config.max_rounds if self.limit is None else self.limit + 1
        return replace(config, max_rounds=max_rounds, zoom_fps=self.fps or config.zoom_fps)
