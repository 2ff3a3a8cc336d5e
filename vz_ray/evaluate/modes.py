"""How a benchmark is played: by the agent with so many zooms, or from uniform frames without the tool."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vz_ray.config.episode import EpisodeConfig, uniform

AGENT, UNIFORM = "agent", "uniform"


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to play.

    Attributes:
        kind: `agent` or `uniform`.
        limit: Most zooms of an agent, None where its config says; or uniform frames.

    Example: `agent`, `agent:2`, `uniform:32`
    """

    kind: str
    limit: int | None = None

    @classmethod
    def of(cls, text: str) -> Mode:
        """Reads what a config says, which has been checked there."""
        kind, _, limit = text.partition(":")
        return cls(kind, int(limit) if limit else None)

    def __str__(self) -> str:
        return self.kind if self.limit is None else f"{self.kind}:{self.limit}"

    @property
    def stage(self) -> str:
        """For names of files: `agent`, `agent_2`, `uniform_32`."""
        return str(self).replace(":", "_")

    @property
    def title(self) -> str:
        if self.kind == UNIFORM:
            return f"uniform, {self.limit} frames"
        return "agent" if self.limit is None else f"agent, zooms <= {self.limit}"

    def rules(self, config: EpisodeConfig, uniform_prompt: str) -> EpisodeConfig:
        """The episode's rules in this mode."""
        if self.kind == UNIFORM:
            return replace(uniform(config, self.limit or 1), prompt=uniform_prompt)
        return config if self.limit is None else replace(config, max_rounds=self.limit + 1)
