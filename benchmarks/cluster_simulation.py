"""An iteration's episodes on engines and decoders that are only figures: who waits for whom, and how long."""

from __future__ import annotations

import heapq
import random
from collections import deque
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A GPU and a model on it.

    Attributes:
        params: Of the language model.
        vision_params: Of the vision tower.
        kv_bytes: Of the key/value cache for each token.
        flops: Peak of a GPU, bfloat16, each second.
        bandwidth: Of its memory, bytes each second.
        decode_share: Of the bandwidth that sampling reaches.
        prefill_mfu: Of the peak that reading a prompt reaches.
        learner_mfu: Of the peak that learning reaches, recomputation not counted as work.
        learner_passes: Forward passes of the learner that a token takes part in: forward and backward count three,
            recomputed activations one, old log-probs one, the reference one.
        publish_s: From pause to resume.
    """

    params: float = 7.6e9
    vision_params: float = 0.68e9
    kv_bytes: float = 57_344
    flops: float = 989e12
    bandwidth: float = 3.35e12
    decode_share: float = 0.6
    prefill_mfu: float = 0.4
    learner_mfu: float = 0.35
    learner_passes: float = 6.0
    publish_s: float = 3.0

    def step_s(self, sampling: int, context: float) -> float:
        """One token for each of `sampling` conversations of so many tokens."""
        read = 2 * self.params + sampling * context * self.kv_bytes
        return max(
            read / (self.bandwidth * self.decode_share),
            2 * self.params * sampling / (self.flops * self.prefill_mfu),
        )

    def read_s(self, tokens: float, frames: float, tokens_per_frame: float) -> float:
        """A prompt's new tokens, and the frames among them."""
        patches = 4 * tokens_per_frame * frames
        return 2 * (self.params * tokens + self.vision_params * patches) / (self.flops * self.prefill_mfu)

    def learn_s(self, tokens: float, ranks: int) -> float:
        """All tokens of an iteration."""
        return 2 * self.params * tokens * self.learner_passes / (ranks * self.flops * self.learner_mfu)


@dataclass(frozen=True, slots=True)
class EpisodeShape:
    """An episode.

    Attributes:
        turn_tokens: Tokens said in each turn.
        clip_frames: Frames of the clip after each but the last.
    """

    turn_tokens: tuple[int, ...]
    clip_frames: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """What does not depend on how many GPUs there are.

    Attributes:
        episode_shapes: Episodes, drawn from.
        batch_size, samples: Of an iteration.
        max_concurrent_episodes: Episodes that an engine plays at once.
        overview_frames: Frames of it.
        frame_tokens: Tokens of a frame.
        text_tokens: Of instructions and question.
        zoom_cpu_s, overview_cpu_s: CPU seconds of decoding; the first sample of a task finds no overview.
    """

    episode_shapes: tuple[EpisodeShape, ...]
    batch_size: int = 128
    group_size: int = 16
    max_concurrent_episodes: int = 64
    overview_frames: int = 64
    frame_tokens: int = 128
    text_tokens: int = 400
    zoom_cpu_s: float = 0.184
    overview_cpu_s: float = 4.65

    @property
    def prefix(self) -> int:
        """Tokens before the first turn."""
        return self.text_tokens + self.overview_frames * (self.frame_tokens + 12)

    def tokens(self, shape: EpisodeShape) -> int:
        """Of a whole trajectory, as the learner sees it."""
        return (
            self.prefix
            + sum(shape.turn_tokens)
            + sum(self.clip_tokens(frames) for frames in shape.clip_frames)
        )

    def clip_tokens(self, frames: int) -> int:
        return 60 + frames * (self.frame_tokens + 12)


def paper_episode_shapes(count: int = 2048, seed: int = 0) -> tuple[EpisodeShape, ...]:
    """Two zooms on average, up to four, and a hundred to three hundred tokens a turn."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        zooms = draw.choices(range(5), (8, 27, 35, 20, 10))[0]
        turns = tuple(int(draw.lognormvariate(5.0, 0.5)) for _ in range(zooms + 1))
        found.append(EpisodeShape(turns, tuple(draw.choice((8, 12, 16, 16)) for _ in range(zooms))))
    return tuple(found)


def recorded_episode_shapes(run: Path) -> tuple[EpisodeShape, ...]:
    """Those of a run's episodes."""
    from vz_ray.data.episode_record import read_records
    from vz_ray.env.trajectory import SampledAction

    found = []
    for path in sorted((run / "episodes").glob("*.jsonl")):
        for record in read_records(path):
            turns = [turn for turn in record.trajectory.turns if isinstance(turn.action, SampledAction)]
            said = tuple(
                len(turn.action.token_ids) for turn in turns if isinstance(turn.action, SampledAction)
            )
            clips = tuple(len(turn.observation.frames) if turn.observation else 0 for turn in turns[:-1])
            if said:
                found.append(EpisodeShape(said, clips))
    if not found:
        raise SystemExit(f"{run} has no episodes")
    return tuple(found)


@dataclass(slots=True)
class _SimulatedEpisode:
    """One under way: `left` is of the turn that it samples."""

    shape: EpisodeShape
    task: int
    turn: int = 0
    left: float = 0.0
    context: float = 0.0


class _SimulatedEngine:
    """Samples all its turns at once, slower the more there are; reads one prompt at a time.

    Attributes:
        busy: Seconds in which it had something to do.
        playing: Episodes that have a place on it.
        stamp: Changes with every look at it, so that what was expected before is known to be out of date.
    """

    def __init__(self, machine: GpuModel) -> None:
        self._machine = machine
        self._sampling: list[_SimulatedEpisode] = []
        self._reading: deque[tuple[_SimulatedEpisode, float]] = deque()
        self._at = 0.0
        self.busy, self.playing, self.stamp = 0.0, 0, 0

    def _rate(self) -> float:
        context = sum(one.context for one in self._sampling) / len(self._sampling)
        return 1.0 / self._machine.step_s(len(self._sampling), context)

    def read(self, episode: _SimulatedEpisode, seconds: float) -> None:
        """Hands it, as of its last `advance`, a prompt that takes so long, and then a turn to be said."""
        self._reading.append((episode, seconds))

    def next(self) -> float:
        """When something of it ends, if nothing comes."""
        if self._reading:
            return self._at + self._reading[0][1]
        if not self._sampling:
            return float("inf")
        return self._at + min(one.left for one in self._sampling) / self._rate()

    def advance(self, now: float) -> list[_SimulatedEpisode]:
        """Goes on to `now`, at most as far as `next`; returns those whose turns have ended."""
        self.stamp += 1
        passed, self._at = now - self._at, now
        if self._reading:
            self.busy += passed
            episode, seconds = self._reading[0]
            if seconds - passed > 1e-9:
                self._reading[0] = (episode, seconds - passed)
                return []
            self._reading.popleft()
            episode.left = float(episode.shape.turn_tokens[episode.turn])
            self._sampling.append(episode)
            return []
        if not self._sampling:
            return []
        self.busy += passed
        said = self._rate() * passed
        for one in self._sampling:
            one.left -= said
            one.context += said
        ended = [one for one in self._sampling if one.left <= 1e-6]
        self._sampling = [one for one in self._sampling if one.left > 1e-6]
        return ended


@dataclass(frozen=True, slots=True)
class RolloutTimes:
    """One iteration's episodes.

    Attributes:
        seconds: Until the last has ended.
        busy: Share of that in which engines had something to do.
        clip_wait_s: Mean wait for a clip, decoding included.
        last_tenth_s: Time in which only the last tenth of the episodes was played.
        tokens: That the learner sees.
    """

    seconds: float
    busy: float
    clip_wait_s: float
    last_tenth_s: float
    tokens: float


def simulate_rollout(
    world: SimulationConfig, machine: GpuModel, engines: int, decoders: int, seed: int = 0
) -> RolloutTimes:
    """Simulates an iteration's episodes."""
    return _Simulation(world, machine, engines, decoders, seed).run()


class _Simulation:
    """Tasks go whole to the engine with the most free places; what comes next is in two heaps."""

    def __init__(
        self, world: SimulationConfig, machine: GpuModel, engines: int, decoders: int, seed: int
    ) -> None:
        self._world, self._machine = world, machine
        draw = random.Random(seed)
        self._waiting = deque(
            [_SimulatedEpisode(draw.choice(world.episode_shapes), task) for _ in range(world.group_size)]
            for task in range(world.batch_size)
        )
        self._fleet = [_SimulatedEngine(machine) for _ in range(engines)]
        self._home: dict[int, _SimulatedEngine] = {}
        self._read: set[int] = set()
        self._free = [0.0] * decoders
        self._now, self._number = 0.0, 0
        self._arriving: list[tuple[float, int, _SimulatedEpisode]] = []
        self._expected: list[tuple[float, int, int, _SimulatedEngine]] = []
        self._waits: list[float] = []
        self._ends: list[float] = []
        self._tokens = 0.0

    def run(self) -> RolloutTimes:
        self._admit()
        while self._arriving or self._expected:
            arrival = self._arriving[0][0] if self._arriving else float("inf")
            ending = self._expected[0][0] if self._expected else float("inf")
            if arrival <= ending:
                self._now, _, episode = heapq.heappop(self._arriving)
                self._show(episode)
                continue
            when, _, stamp, engine = heapq.heappop(self._expected)
            if stamp == engine.stamp:
                self._now = when
                self._end_turns(engine)
        self._ends.sort()
        return RolloutTimes(
            seconds=self._now,
            busy=sum(engine.busy for engine in self._fleet) / (len(self._fleet) * self._now),
            clip_wait_s=sum(self._waits) / len(self._waits),
            last_tenth_s=self._now - self._ends[int(0.9 * len(self._ends))],
            tokens=self._tokens,
        )

    def _expect(self, engine: _SimulatedEngine) -> None:
        if (when := engine.next()) < float("inf"):
            self._number += 1
            heapq.heappush(self._expected, (when, self._number, engine.stamp, engine))

    def _arrive(self, when: float, episode: _SimulatedEpisode) -> None:
        self._number += 1
        heapq.heappush(self._arriving, (when, self._number, episode))

    def _decoded(self, cpu_s: float) -> float:
        """When the decoder that is free first has done so much more."""
        when = max(self._now, heapq.heappop(self._free)) + cpu_s
        heapq.heappush(self._free, when)
        self._waits.append(when - self._now)
        return when

    def _admit(self) -> None:
        while self._waiting:
            engine = min(self._fleet, key=lambda one: one.playing)
            if engine.playing >= self._world.max_concurrent_episodes:
                return
            group = self._waiting.popleft()
            self._home[group[0].task] = engine
            engine.playing += len(group)
            self._tokens += sum(self._world.tokens(one.shape) for one in group)
            # One overview for all samples of a task: they ask for the same.
            when = self._decoded(self._world.overview_cpu_s)
            for one in group:
                self._arrive(when, one)

    def _show(self, episode: _SimulatedEpisode) -> None:
        """Hands an engine what was decoded; later samples of a task find their prompt in the cache."""
        world, engine = self._world, self._home[episode.task]
        self._end_turns(engine)
        if episode.turn:
            frames = episode.shape.clip_frames[episode.turn - 1]
            fresh = float(world.clip_tokens(frames))
            episode.context += fresh
        else:
            cached = episode.task in self._read
            self._read.add(episode.task)
            fresh, frames = (0.0, 0) if cached else (float(world.prefix), world.overview_frames)
            episode.context = float(world.prefix)
        engine.read(episode, max(1e-6, self._machine.read_s(fresh, frames, world.frame_tokens)))
        self._expect(engine)

    def _end_turns(self, engine: _SimulatedEngine) -> None:
        for episode in engine.advance(self._now):
            episode.turn += 1
            if episode.turn < len(episode.shape.turn_tokens):
                self._arrive(self._decoded(self._world.zoom_cpu_s), episode)
                continue
            self._ends.append(self._now)
            engine.playing -= 1
        self._expect(engine)
        self._admit()
