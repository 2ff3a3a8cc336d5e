"""An iteration's episodes on engines and decoders that are only figures: who waits for whom, and how long."""

from __future__ import annotations

import heapq
import random
from collections import deque
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Machine:
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
        passes: Forward passes of the learner that a token takes part in: forward and backward count three,
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
    passes: float = 6.0
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
        return 2 * self.params * tokens * self.passes / (ranks * self.flops * self.learner_mfu)


@dataclass(frozen=True, slots=True)
class Shape:
    """An episode.

    Attributes:
        turns: Tokens said in each turn.
        clips: Frames of the clip after each but the last.
    """

    turns: tuple[int, ...]
    clips: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class World:
    """What does not depend on how many GPUs there are.

    Attributes:
        shapes: Episodes, drawn from.
        tasks, samples: Of an iteration.
        places: Episodes that an engine plays at once.
        overview: Frames of it.
        frame_tokens: Tokens of a frame.
        text_tokens: Of instructions and question.
        zoom_cpu_s, overview_cpu_s: CPU seconds of decoding; the first sample of a task finds no overview.
    """

    shapes: tuple[Shape, ...]
    tasks: int = 128
    samples: int = 16
    places: int = 64
    overview: int = 64
    frame_tokens: int = 128
    text_tokens: int = 400
    zoom_cpu_s: float = 0.184
    overview_cpu_s: float = 4.65

    @property
    def prefix(self) -> int:
        """Tokens before the first turn."""
        return self.text_tokens + self.overview * (self.frame_tokens + 12)

    def tokens(self, shape: Shape) -> int:
        """Of a whole trajectory, as the learner sees it."""
        return self.prefix + sum(shape.turns) + sum(self.clip_tokens(frames) for frames in shape.clips)

    def clip_tokens(self, frames: int) -> int:
        return 60 + frames * (self.frame_tokens + 12)


def papers_shapes(count: int = 2048, seed: int = 0) -> tuple[Shape, ...]:
    """Two zooms on average, up to four, and a hundred to three hundred tokens a turn."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        zooms = draw.choices(range(5), (8, 27, 35, 20, 10))[0]
        turns = tuple(int(draw.lognormvariate(5.0, 0.5)) for _ in range(zooms + 1))
        found.append(Shape(turns, tuple(draw.choice((8, 12, 16, 16)) for _ in range(zooms))))
    return tuple(found)


def recorded_shapes(run: Path) -> tuple[Shape, ...]:
    """Those of a run's episodes."""
    from vz_ray.data.record import read_records
    from vz_ray.episode.trajectory import Sampled

    found = []
    for path in sorted((run / "episodes").glob("*.jsonl")):
        for record in read_records(path):
            turns = [turn for turn in record.trajectory.turns if isinstance(turn.action, Sampled)]
            said = tuple(len(turn.action.token_ids) for turn in turns if isinstance(turn.action, Sampled))
            clips = tuple(len(turn.observation.frames) if turn.observation else 0 for turn in turns[:-1])
            if said:
                found.append(Shape(said, clips))
    if not found:
        raise SystemExit(f"{run} has no episodes")
    return tuple(found)


@dataclass(slots=True)
class _Episode:
    """One under way: `left` is of the turn that it samples."""

    shape: Shape
    task: int
    turn: int = 0
    left: float = 0.0
    context: float = 0.0


class _Engine:
    """Samples all its turns at once, slower the more there are; reads one prompt at a time."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.sampling: list[_Episode] = []
        self.reading: deque[tuple[_Episode, float]] = deque()
        self._at = 0.0

    @property
    def load(self) -> int:
        return len(self.sampling) + len(self.reading)

    def _rate(self) -> float:
        context = sum(one.context for one in self.sampling) / max(1, len(self.sampling))
        return 1.0 / self._machine.step_s(len(self.sampling), context)

    def next(self) -> float:
        """When something of it ends, if nothing comes."""
        if self.reading:
            return self._at + self.reading[0][1]
        if not self.sampling:
            return float("inf")
        return self._at + min(one.left for one in self.sampling) / self._rate()

    def advance(self, now: float) -> list[_Episode]:
        """Goes on to `now`; returns those whose turns have ended."""
        passed, self._at = now - self._at, now
        if self.reading:
            episode, seconds = self.reading[0]
            if seconds - passed > 1e-9:
                self.reading[0] = (episode, seconds - passed)
                return []
            self.reading.popleft()
            episode.left = float(episode.shape.turns[episode.turn])
            self.sampling.append(episode)
            return []
        rate = self._rate() if self.sampling else 0.0
        for one in self.sampling:
            one.left -= rate * passed
            one.context += rate * passed
        ended = [one for one in self.sampling if one.left <= 1e-6]
        self.sampling = [one for one in self.sampling if one.left > 1e-6]
        return ended


@dataclass(frozen=True, slots=True)
class Rollout:
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


def rollout(world: World, machine: Machine, engines: int, decoders: int, seed: int = 0) -> Rollout:
    """Simulates an iteration's episodes: tasks whole to the engine with the most free places."""
    draw = random.Random(seed)
    groups = deque(
        [_Episode(draw.choice(world.shapes), task) for _ in range(world.samples)]
        for task in range(world.tasks)
    )
    fleet = [_Engine(machine) for _ in range(engines)]
    playing = [0] * engines
    home: dict[int, int] = {}
    free = [0.0] * decoders
    heapq.heapify(free)
    arriving: list[tuple[float, int, _Episode]] = []
    seen: set[int] = set()
    waits: list[float] = []
    ends: list[float] = []
    busy, now, number, tokens = [0.0] * engines, 0.0, 0, 0.0

    def decode(episode: _Episode, cpu_s: float) -> None:
        nonlocal number
        start = max(now, heapq.heappop(free))
        heapq.heappush(free, start + cpu_s)
        waits.append(start + cpu_s - now)
        number += 1
        heapq.heappush(arriving, (start + cpu_s, number, episode))

    def admit() -> None:
        nonlocal tokens
        while groups:
            index = min(range(engines), key=lambda one: playing[one])
            if playing[index] >= world.places:
                return
            group = groups.popleft()
            home[group[0].task] = index
            playing[index] += len(group)
            tokens += sum(world.tokens(one.shape) for one in group)
            # One overview for all samples of a task: they ask for the same.
            decode(group[0], world.overview_cpu_s)
            when = (
                arriving[-1][0]
                if len(arriving) == 1
                else max(one[0] for one in arriving if one[2] is group[0])
            )
            for one in group[1:]:
                heapq.heappush(arriving, (when, draw.randrange(1 << 30), one))

    admit()
    while arriving or any(engine.load for engine in fleet):
        upcoming = min(engine.next() for engine in fleet)
        moment = min(upcoming, arriving[0][0] if arriving else float("inf"))
        for index, engine in enumerate(fleet):
            busy[index] += (moment - now) if engine.load else 0.0
        now_before, now = now, moment
        assert now >= now_before - 1e-9
        for index, engine in enumerate(fleet):
            for episode in engine.advance(now):
                episode.turn += 1
                if episode.turn < len(episode.shape.turns):
                    decode(episode, world.zoom_cpu_s)
                    continue
                ends.append(now)
                playing[index] -= 1
        while arriving and arriving[0][0] <= now + 1e-9:
            episode = heapq.heappop(arriving)[2]
            _read(world, machine, fleet[home[episode.task]], episode, seen)
        admit()
    ends.sort()
    return Rollout(
        seconds=now,
        busy=sum(busy) / (engines * now),
        clip_wait_s=sum(waits) / len(waits),
        last_tenth_s=now - ends[int(0.9 * len(ends))],
        tokens=tokens,
    )


def _read(world: World, machine: Machine, engine: _Engine, episode: _Episode, seen: set[int]) -> None:
    """Hands an engine what was shown; later samples of a task find their prompt in the cache."""
    if episode.turn == 0:
        cached = episode.task in seen
        seen.add(episode.task)
        fresh, frames = (0.0, 0) if cached else (float(world.prefix), world.overview)
        episode.context = float(world.prefix)
    else:
        frames = episode.shape.clips[episode.turn - 1]
        fresh = float(world.clip_tokens(frames))
        episode.context += fresh
    engine.reading.append((episode, max(1e-6, machine.read_s(fresh, frames, world.frame_tokens))))
