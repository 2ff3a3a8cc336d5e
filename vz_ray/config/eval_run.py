"""Config of evaluations on benchmarks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from vz_ray.config.fields import InvalidValueError, Section
from vz_ray.config.run import RolloutRunConfig

SAMPLING_STRATEGY_PATTERN = r"all|(?:first|end|random):\d+|\d+(?:\.\d+)?%"
"""Regular expression (full match) of `sampling_strategy`."""
MODE_PATTERN = r"agent(:\d+)?(@(?=.*[1-9])\d+(\.\d+)?fps)?|uniform:[1-9]\d*"
"""Regular expression (full match) of an evaluation mode."""
LABEL_PATTERN = r"(?!(agent|uniform|model)$)[A-Za-z][A-Za-z0-9-]*"
"""Regular expression (full match) of a label of a further checkpoint, used in tables and file names."""


@dataclass
class BenchmarkConfig(Section):
    """Files and questions of one benchmark."""

    adapter: str = ""
    """Adapter that reads the files: a benchmark's name, or `package.module:function`; default: the entry's
    name."""
    annotations: str = ""
    """Released annotation file, or its folder."""
    videos: str = ""
    """Folder of the videos, searched recursively; default: the folder of the annotations."""
    answers: str = ""
    """File of the answers if they are released separately (MLVU test)."""
    subtitles: str = ""
    """Folder of subtitles, shown between the frames; empty shows none."""
    embedding_model: str = ""
    """Folder of a sentence-embedding model for TemporalBench captions; empty skips that metric."""
    sampling_strategy: str = "all"
    """Questions to evaluate: `all`, `first:N`, `end:N`, `random:N`, or a random share `N%`; random with
    `seed`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if re.fullmatch(SAMPLING_STRATEGY_PATTERN, self.sampling_strategy) is None:
            raise InvalidValueError(
                "sampling_strategy",
                f"is {self.sampling_strategy!r}; it must be all, first:N, end:N, random:N or N%",
            )


@dataclass
class CurveConfig(Section):
    """Modes of `vz-ray eval --curve`, which replace `modes`."""

    uniform_frames: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128])
    """Numbers of uniform frames, without the tool."""
    max_zooms: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    """Maximum numbers of zooms of the agent."""
    zoom_fps: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0, 4.0])
    """Fixed frame rates of every zoom."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(frames < 1 for frames in self.uniform_frames):
            raise InvalidValueError("uniform_frames", f"is {self.uniform_frames}; each value must be at least 1")
        if any(zooms < 0 for zooms in self.max_zooms):
            raise InvalidValueError("max_zooms", f"is {self.max_zooms}; each value must be at least 0")
        if not all(0 < fps < 1000 for fps in self.zoom_fps):
            raise InvalidValueError("zoom_fps", f"is {self.zoom_fps}; each value must be above 0 and below 1000")

    @property
    def modes(self) -> list[str]:
        return [
            *(f"uniform:{frames}" for frames in self.uniform_frames),
            *(f"agent:{zooms}" for zooms in self.max_zooms),
            *(f"agent@{fps:g}fps" for fps in self.zoom_fps),
        ]


@dataclass
class EvalRunConfig(RolloutRunConfig):
    """Config of `vz-ray eval`."""

    data: str = ""
    """Folder that the paths of `benchmarks` are relative to; default: the working directory."""
    benchmarks: dict[str, BenchmarkConfig] = field(default_factory=dict)
    """Benchmarks by a name of your choice; a benchmark's own name needs no `adapter`."""
    modes: list[str] = field(default_factory=lambda: ["agent"])
    """Evaluation modes: `agent`, `agent:N` (at most N zooms), `agent@Nfps` (every zoom at N frames per
    second), `agent:N@Mfps` (both), or `uniform:N` (N uniform frames, no tool)."""
    compare: dict[str, str] = field(default_factory=dict)
    """Further checkpoints that answer the same questions in the same modes, by label."""
    uniform_prompt: str = "conf/prompt/answer.yaml"
    """Prompt file of `uniform` modes, without the tool."""
    curve: CurveConfig = field(default_factory=CurveConfig)
    """Accuracy by frames, zooms and zoom frame rate."""
    allow_missing: bool = False
    """Skip questions with missing videos; the output reports their number."""
    image_cache_dir: str = ""
    """Directory of question images, visible to every node; default: the user's cache directory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for mode in self.modes:
            if re.fullmatch(MODE_PATTERN, mode) is None:
                raise InvalidValueError(
                    "modes",
                    f"has {mode!r}; a mode must be agent, agent:N, agent@Nfps, agent:N@Mfps or uniform:N",
                )
        for label in self.compare:
            if re.fullmatch(LABEL_PATTERN, label) is None:
                raise InvalidValueError(
                    "compare",
                    f"has the label {label!r}; a label must consist of letters, digits and hyphens, and must not be "
                    "agent, uniform or model",
                )

    @property
    def images_per_prompt(self) -> int:
        counts = [re.fullmatch(r"uniform:(\d+)", mode) for mode in self.modes]
        return max(self.episode.max_images, *(int(count[1]) for count in counts if count), 1)
