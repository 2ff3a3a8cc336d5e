"""How a benchmark is played: by the agent with so many zooms, or from uniform frames without the tool."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from vz_ray.config.episode import EpisodeConfig, uniform_frames_config

AGENT, UNIFORM = "agent", "uniform"
MAIN_MODEL = "model"
"""Who plays where no label says so: the run's own `model`."""
_MODE = re.compile(r"(?:(?P<model>[^/]+)/)?(?P<kind>\w+)(?::(?P<limit>\d+))?(?:@(?P<fps>[\d.]+)fps)?")


@dataclass(frozen=True, slots=True)
class EvalMode:
    """One way to play.

    Attributes:
        kind: `agent` or `uniform`.
        limit: Most zooms of an agent, None where its config says; or uniform frames.
        fps: Frame rate of every zoom; None leaves it to the agent.
        model: Label of the checkpoint that plays.

    Example: `agent`, `agent:2`, `agent@0.5fps`, `uniform:32`, `sft/agent:2`
    """

    kind: str
    limit: int | None = None
    fps: float | None = None
    model: str = MAIN_MODEL

    @classmethod
    def parse(cls, text: str) -> EvalMode:
        """Reads what a config says, which has been checked there, or what `str` wrote."""
        match = _MODE.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no mode such as agent, agent:2, agent@0.5fps or uniform:32")
        limit, fps = match["limit"], match["fps"]
        return cls(
            kind=match["kind"],
            limit=int(limit) if limit else None,
            fps=float(fps) if fps else None,
            model=match["model"] or MAIN_MODEL,
        )

    def __str__(self) -> str:
        who = "" if self.model == MAIN_MODEL else f"{self.model}/"
        limit = "" if self.limit is None else f":{self.limit}"
        return f"{who}{self.kind}{limit}" + ("" if self.fps is None else f"@{self.fps:g}fps")

    @property
    def stage(self) -> str:
        """For names of files: `agent`, `agent_2`, `agent_0.5fps`, `uniform_32`, `sft_agent_2`."""
        return re.sub("[/:@]", "_", str(self))

    @property
    def title(self) -> str:
        who = "" if self.model == MAIN_MODEL else f"{self.model}: "
        if self.kind == UNIFORM:
            return f"{who}uniform, {self.limit} frames"
        limit = "" if self.limit is None else f", zooms <= {self.limit}"
        return f"{who}agent{limit}" + ("" if self.fps is None else f", zooms at {self.fps:g} fps")

    def episode_config(self, config: EpisodeConfig, uniform_prompt: str) -> EpisodeConfig:
        """The episode's rules in this mode."""
        if self.kind == UNIFORM:
            return replace(uniform_frames_config(config, self.limit or 1), prompt=uniform_prompt)
        rounds = config.max_rounds if self.limit is None else self.limit + 1
        return replace(config, max_rounds=rounds, zoom_fps=self.fps or config.zoom_fps)
