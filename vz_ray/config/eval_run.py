"""An evaluation on public benchmarks: which, where their files are, and how they are played."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from vz_ray.config.eval import SAMPLING_STRATEGY_PATTERN
from vz_ray.config.run import RolloutRunConfig

MODE_PATTERN = r"agent(:\d+)?(@(?=.*[1-9])\d+(\.\d+)?fps)?|uniform:[1-9]\d*"
"""How questions are played; a regular expression of the whole."""
LABEL_PATTERN = r"(?!(agent|uniform|model)$)[A-Za-z][A-Za-z0-9-]*"
"""What a further checkpoint may be called in tables and names of files; a regular expression of the whole."""


@dataclass
class BenchmarkConfig:
    """One benchmark's files, and which of its questions are played."""

    adapter: str = ""
    """What reads the files: a benchmark's name, or `package.module:function`; empty is the entry's name."""
    annotations: str = ""
    """The released annotation file, or the folder with it."""
    videos: str = ""
    """Folder of the videos, searched whole; empty is that of the annotations."""
    answers: str = ""
    """File with the truth, where it is apart (MLVU test)."""
    subtitles: str = ""
    """Folder of subtitles, shown between the frames; empty shows none."""
    embedding_model: str = ""
    """Folder of a sentence-embedding model (TemporalBench captions); empty leaves those unmeasured."""
    sampling_strategy: str = "all"
    """Which questions: `all`, `first:N`, `end:N`, `random:N`, or a share `N%`, drawn; with `seed`."""

    def __post_init__(self) -> None:
        if re.fullmatch(SAMPLING_STRATEGY_PATTERN, self.sampling_strategy) is None:
            raise ValueError(
                f"sampling_strategy is {self.sampling_strategy!r}; "
                "it must be all, first:N, end:N, random:N or N%"
            )


@dataclass
class CurveConfig:
    """What `vz-ray eval --curve` plays in place of `modes`."""

    uniform_frames: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128])
    """Numbers of uniform frames, without the tool."""
    max_zooms: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    """Most zooms that the agent may make."""
    zoom_fps: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0, 4.0])
    """Frame rates of every zoom, whatever rate the agent asks for."""

    def __post_init__(self) -> None:
        if any(frames < 1 for frames in self.uniform_frames) or any(zooms < 0 for zooms in self.max_zooms):
            raise ValueError(
                f"curve.uniform_frames is {self.uniform_frames} and curve.max_zooms {self.max_zooms}; "
                "numbers of frames are at least 1, of zooms at least 0"
            )
        if not all(0 < fps < 1000 for fps in self.zoom_fps):
            raise ValueError(f"curve.zoom_fps is {self.zoom_fps}; frame rates are above 0 and below 1000")

    @property
    def modes(self) -> list[str]:
        return [
            *(f"uniform:{count}" for count in self.uniform_frames),
            *(f"agent:{count}" for count in self.max_zooms),
            *(f"agent@{fps:g}fps" for fps in self.zoom_fps),
        ]


@dataclass
class EvalRunConfig(RolloutRunConfig):
    """`vz-ray eval conf/eval/x.yaml model=... data=...` fills it in."""

    data: str = ""
    """Folder that the paths of `benchmarks` are relative to; empty is the working directory."""
    benchmarks: dict[str, BenchmarkConfig] = field(default_factory=dict)
    """What is played, by a name of your choice; a benchmark's own name needs no `adapter`."""
    modes: list[str] = field(default_factory=lambda: ["agent"])
    """How: `agent`, `agent:N` (at most N zooms), `agent@Nfps` (every zoom at N frames a second), both in
    `agent:N@Mfps`, or `uniform:N` (N uniform frames, no tool)."""
    compare: dict[str, str] = field(default_factory=dict)
    """Further checkpoints that answer the same questions in the same modes, by a label of your choice."""
    uniform_prompt: str = "conf/prompt/answer.yaml"
    """Wording for uniform frames: a prompt without the tool."""
    curve: CurveConfig = field(default_factory=CurveConfig)
    """Accuracy against frames, zooms and the zooms' frame rate."""
    allow_missing: bool = False
    """Play the questions whose videos are there; the others are counted and shown, not played."""
    image_cache_dir: str = ""
    """Where images of questions are kept; every node must see it. Empty takes the user's cache directory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for mode in self.modes:
            if re.fullmatch(MODE_PATTERN, mode) is None:
                raise ValueError(
                    f"modes has {mode!r}; a mode is agent, agent:N, agent@Nfps, agent:N@Mfps or uniform:N"
                )
        for label in self.compare:
            if re.fullmatch(LABEL_PATTERN, label) is None:
                raise ValueError(
                    f"compare has the label {label!r}; labels are letters, digits and hyphens, and none is "
                    "agent, uniform or model"
                )
        counts = [
            int(mode.removeprefix("uniform:")) for mode in self.modes if mode.startswith("uniform_frames")
        ]
        most, needed = self.rollout.engine.images_per_prompt, max([self.episode.max_images, *counts])
        if needed > most:
            raise ValueError(
                f"rollout.engine.images_per_prompt is {most}, below the {needed} frames of "
                "episode.max_images or of a mode: the engine would refuse them"
            )
