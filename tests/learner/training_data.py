"""Random trajectories with random frames for the learner's tests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    Group,
    RewardParts,
    SampledAction,
    SamplingParams,
    TokenContext,
    Trajectory,
    Turn,
    VersionSpan,
)
from vz_ray.learner.image_patches import ImageSpec
from vz_ray.needle.tiny_model import TinyModelConfig, build_tiny_model
from vz_ray.video.errors import FrameMismatchError
from vz_ray.video.frame import RGB, Frame, FrameRef

TEXTS = ("<frame0_time0.00s> which colour flashes while the marker is shown? <answer>red</answer>",)
SMALL = TinyModelConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=64,
    vision_hidden_size=32,
    vocab_size=512,
    tie_word_embeddings=False,
)


@dataclass(frozen=True)
class TrainingData:
    """A checkpoint directory, groups of trajectories for its tokenizer, and pixels by digest."""

    model: Path
    groups: tuple[Group, ...]
    pixels: dict[str, RGB]

    @property
    def trajectories(self) -> list[Trajectory]:
        return [trajectory for group in self.groups for trajectory in group.trajectories]


@dataclass
class TrajectoryWriter:
    """Generates contexts and turns of random tokens, and records their frames."""

    rng: np.random.Generator
    ids: dict[str, int]
    pixels: dict[str, RGB]
    spec: ImageSpec
    sides: tuple[int, ...] = (1,)
    """Sides of frames in visual tokens, drawn at random."""

    def text(self, count: int) -> tuple[int, ...]:
        return tuple(int(t) for t in self.rng.integers(20, 300, size=count))

    def frame(self) -> FrameRef:
        height, width = self.spec.patch_size * self.spec.merge_size * self.rng.choice(self.sides, size=2)
        digest = f"frame-{len(self.pixels)}"
        self.pixels[digest] = self.rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
        return FrameRef("video", "video.mp4", 0, 0.0, int(width), int(height), "none", "none", digest)

    def context(self, refs: tuple[FrameRef, ...], before: int, between: int, after: int) -> TokenContext:
        ids, grids = list(self.text(before)), []
        for ref in refs:
            grids.append(self.spec.grid(ref.height, ref.width))
            ids += [*self.text(between), self.ids["<|vision_start|>"]]
            ids += [self.ids["<|image_pad|>"], self.ids["<|vision_end|>"]]
        ids += self.text(after)
        return TokenContext(tuple(ids), tuple(grids), refs, self.ids["<|image_pad|>"], merge_size=2)

    def turn(self, count: int, observation: TokenContext | None, temperature: float = 1.0) -> Turn:
        logprobs = tuple(float(p) for p in -self.rng.random(count) * 6)
        spans = (VersionSpan(0, count, 0),)
        action = SampledAction(self.text(count), logprobs, spans, SamplingParams(temperature=temperature), "end")
        return Turn(action, "", None, observation)


def token_ids(model: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    return dict(AutoTokenizer.from_pretrained(model).get_vocab())


def make_training_data(
    directory: Path | str,
    *,
    groups: int = 4,
    samples: int = 4,
    overview: int = 16,
    clip: int = 8,
    sides: tuple[int, ...] = (1,),
    shape: TinyModelConfig | None = None,
    seed: int = 0,
) -> TrainingData:
    """Return groups with a shared overview; each sample gets a different clip, then answers.

    `sides` are sides of frames in visual tokens.
    """
    model = Path(directory)
    if not (model / "config.json").exists():
        build_tiny_model(model, TEXTS, config=shape)
    spec = ImageSpec.from_pretrained(model)
    writer = TrajectoryWriter(np.random.default_rng(seed), token_ids(model), {}, spec, sides)
    members = tuple(_uniform_group(writer, number, samples, overview, clip) for number in range(groups))
    return TrainingData(model, members, writer.pixels)


def _uniform_group(writer: TrajectoryWriter, number: int, samples: int, overview: int, clip: int) -> Group:
    prompt = writer.context(tuple(writer.frame() for _ in range(overview)), 40, 6, 20)
    trajectories = []
    for sample in range(samples):
        observation = writer.context(tuple(writer.frame() for _ in range(clip)), 6, 6, 6)
        turns = [writer.turn(int(writer.rng.integers(15, 25)), observation if clip else None)]
        if clip:
            turns.append(writer.turn(int(writer.rng.integers(10, 20)), None, temperature=0.7))
        reward = RewardParts(float(writer.rng.random()), 0.0, 0.0, 0.0)
        name = EpisodeId(0, f"task-{number}", sample)
        trajectories.append(Trajectory(name, "test", prompt, tuple(turns), EpisodeStatus.ANSWERED, reward=reward))
    return Group(f"task-{number}", tuple(trajectories))


def make_varied_data(
    model: Path, *, groups: int = 2, samples: int = 5, overview: int = 4, seed: int = 0
) -> TrainingData:
    """Return groups whose samples zoom 0 to 4 times and share their first tokens and some clips."""
    spec = ImageSpec.from_pretrained(model)
    writer = TrajectoryWriter(np.random.default_rng(seed), token_ids(model), {}, spec, (1, 2))
    return TrainingData(model, tuple(_varied_group(writer, g, samples, overview) for g in range(groups)), writer.pixels)


def _varied_group(writer: TrajectoryWriter, number: int, samples: int, overview: int) -> Group:
    rng = writer.rng
    prompt = writer.context(tuple(writer.frame() for _ in range(overview)), 30, 4, 15)
    clips = [writer.context(tuple(writer.frame() for _ in range(3)), 4, 4, 4) for _ in range(3)]
    shared_ids, trajectories = writer.text(3), []
    for sample in range(samples):
        zooms = [clips[int(rng.integers(3))] for _ in range(sample % 5)]
        turns = [
            writer.turn(int(rng.integers(4, 12)), observation, 0.7 + 0.3 * (k % 2))
            for k, observation in enumerate([*zooms, None])
        ]
        action = turns[0].action
        action = replace(action, token_ids=(*shared_ids, *action.token_ids[3:]))
        turns[0] = replace(turns[0], action=action)
        reward = RewardParts(float(rng.random()), 0.0, 0.0, 0.0)
        name = EpisodeId(0, f"task-{number}", sample)
        trajectories.append(Trajectory(name, "test", prompt, tuple(turns), EpisodeStatus.ANSWERED, reward=reward))
    return Group(f"task-{number}", tuple(trajectories))


def small_model(directory: Path, family: str = "qwen2_5_vl") -> Path:
    """Build the smallest model of a family, with random weights."""
    return build_tiny_model(directory, TEXTS, config=SMALL, family=family)


class InMemoryFrameSource:
    """Frame source with all frames in memory; records the requested digests."""

    def __init__(self, pixels: dict[str, RGB]) -> None:
        self.pixels = pixels
        self.requests: list[list[str]] = []

    async def resolve(self, refs: Sequence[FrameRef]) -> list[Frame]:
        self.requests.append([ref.digest for ref in refs])
        return [Frame(ref, self.pixels[ref.digest]) for ref in refs]


class HangingFrameSource(InMemoryFrameSource):
    """Blocks its event loop, so that no asyncio timeout in its process can end the call."""

    async def resolve(self, refs: Sequence[FrameRef]) -> list[Frame]:
        time.sleep(600)  # noqa: ASYNC251 - blocks on purpose
        raise AssertionError("the test should have ended")


class ChangedFrameSource(InMemoryFrameSource):
    """Source with changed videos: missing frames no longer match their references."""

    async def resolve(self, refs: Sequence[FrameRef]) -> list[Frame]:
        if any(ref.digest not in self.pixels for ref in refs):
            raise FrameMismatchError("v.mp4: its frame at 0 s is not the one referred to", "the video changed")
        return await super().resolve(refs)
