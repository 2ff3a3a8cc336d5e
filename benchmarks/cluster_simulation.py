"""Discrete-event simulation of one training step's rollout on engines and decoders."""

from __future__ import annotations

import heapq
import random
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from vz_ray.planning.engine_speed import OVERVIEW_CPU_S, ZOOM_CPU_S, EngineSpeed


@dataclass(frozen=True, slots=True)
class GpuModel(EngineSpeed):
    """Performance model of a GPU and the policy.

    Attributes:
        learner_mfu: Fraction of the peak that the learner reaches, without recomputation.
        learner_passes: Forward-pass equivalents per token: three for forward and backward, one each for
            recomputation, old log-probs and the reference model.
        publish_s: Time of a weight publish, from pause to resume.
    """

    learner_mfu: float = 0.35
    learner_passes: float = 6.0
    publish_s: float = 3.0

    def learn_s(self, tokens: float, ranks: int) -> float:
        """Return the learner time of a step with `tokens` tokens."""
        return 2 * self.params * tokens * self.learner_passes / (ranks * self.flops * self.learner_mfu)


@dataclass(frozen=True, slots=True)
class EpisodeShape:
    """Shape of an episode.

    Attributes:
        turn_tokens: Sampled tokens of each turn.
        clip_frames: Frames of the clip after each turn but the last.
    """

    turn_tokens: tuple[int, ...]
    clip_frames: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """Workload, independent of the number of GPUs.

    Attributes:
        episode_shapes: Episodes to draw from.
        batch_size: Tasks per step.
        group_size: Samples per task.
        max_concurrent_episodes: Concurrent episodes per engine.
        overview_frames: Frames of the overview.
        frame_tokens: Tokens per frame.
        text_tokens: Tokens of instructions and question.
        zoom_cpu_s: CPU seconds to decode a zoom.
        overview_cpu_s: CPU seconds to decode an overview, once per task.
    """

    episode_shapes: tuple[EpisodeShape, ...]
    batch_size: int = 128
    group_size: int = 16
    max_concurrent_episodes: int = 64
    overview_frames: int = 64
    frame_tokens: int = 128
    text_tokens: int = 400
    zoom_cpu_s: float = ZOOM_CPU_S
    overview_cpu_s: float = OVERVIEW_CPU_S

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the first turn."""
        return self.text_tokens + self.overview_frames * (self.frame_tokens + 12)

    def trajectory_tokens(self, shape: EpisodeShape) -> int:
        """Return the tokens of a whole trajectory."""
        clips = sum(self.clip_tokens(frames) for frames in shape.clip_frames)
        return self.prefix_tokens + sum(shape.turn_tokens) + clips

    def clip_tokens(self, frames: int) -> int:
        return 60 + frames * (self.frame_tokens + 12)


def paper_episode_shapes(count: int = 2048, seed: int = 0) -> tuple[EpisodeShape, ...]:
    """Return random shapes like the paper's: two zooms on average, up to four, 100 to 300 tokens per turn."""
    rng = random.Random(seed)
    shapes = []
    for _ in range(count):
        zooms = rng.choices(range(5), (8, 27, 35, 20, 10))[0]
        turns = tuple(int(rng.lognormvariate(5.0, 0.5)) for _ in range(zooms + 1))
        shapes.append(EpisodeShape(turns, tuple(rng.choice((8, 12, 16, 16)) for _ in range(zooms))))
    return tuple(shapes)


def recorded_episode_shapes(run: Path) -> tuple[EpisodeShape, ...]:
    """Return the shapes of a run's recorded episodes."""
    from vz_ray.data.episode_record import read_records
    from vz_ray.env.trajectory import SampledAction

    shapes = []
    for path in sorted((run / "episodes").glob("*.jsonl")):
        for record in read_records(path):
            turns = [turn for turn in record.trajectory.turns if isinstance(turn.action, SampledAction)]
            turn_tokens = tuple(len(turn.action.token_ids) for turn in turns if isinstance(turn.action, SampledAction))
            clip_frames = tuple(len(turn.observation.frame_refs) if turn.observation else 0 for turn in turns[:-1])
            if turn_tokens:
                shapes.append(EpisodeShape(turn_tokens, clip_frames))
    if not shapes:
        raise SystemExit(f"{run} has no episodes")
    return tuple(shapes)


@dataclass(slots=True)
class _SimulatedEpisode:
    """A running episode; `remaining` are the tokens left in its current turn."""

    shape: EpisodeShape
    task: int
    turn: int = 0
    remaining: float = 0.0
    context: float = 0.0


class _SimulatedEngine:
    """Engine that samples all its turns concurrently and prefills one prompt at a time.

    Attributes:
        busy_s: Seconds with work.
        num_episodes: Assigned episodes.
        generation: Incremented by each `advance`; invalidates previously scheduled events.
    """

    def __init__(self, gpu: GpuModel) -> None:
        self._gpu = gpu
        self._sampling: list[_SimulatedEpisode] = []
        self._prefills: deque[tuple[_SimulatedEpisode, float]] = deque()
        self._now = 0.0
        self.busy_s, self.num_episodes, self.generation = 0.0, 0, 0

    def _tokens_per_second(self) -> float:
        context = sum(episode.context for episode in self._sampling) / len(self._sampling)
        return 1.0 / self._gpu.step_s(len(self._sampling), context)

    def prefill(self, episode: _SimulatedEpisode, seconds: float) -> None:
        """Queue a prefill, after which the episode samples its turn. Requires `advance` to the current time."""
        self._prefills.append((episode, seconds))

    def next_event_s(self) -> float:
        """Return the time of the next completed prefill or turn; infinity if the engine is idle."""
        if self._prefills:
            return self._now + self._prefills[0][1]
        if not self._sampling:
            return float("inf")
        remaining = min(episode.remaining for episode in self._sampling)
        return self._now + remaining / self._tokens_per_second()

    def advance(self, now: float) -> list[_SimulatedEpisode]:
        """Advance to `now`, at most to `next_event_s`; return the episodes with completed turns."""
        self.generation += 1
        elapsed, self._now = now - self._now, now
        if self._prefills:
            self.busy_s += elapsed
            episode, seconds = self._prefills[0]
            if seconds - elapsed > 1e-9:
                self._prefills[0] = (episode, seconds - elapsed)
                return []
            self._prefills.popleft()
            episode.remaining = float(episode.shape.turn_tokens[episode.turn])
            self._sampling.append(episode)
            return []
        if not self._sampling:
            return []
        self.busy_s += elapsed
        tokens = self._tokens_per_second() * elapsed
        for episode in self._sampling:
            episode.remaining -= tokens
            episode.context += tokens
        completed = [episode for episode in self._sampling if episode.remaining <= 1e-6]
        self._sampling = [episode for episode in self._sampling if episode.remaining > 1e-6]
        return completed


@dataclass(frozen=True, slots=True)
class RolloutTimes:
    """Result of a simulated rollout.

    Attributes:
        seconds: Time until the last episode ends.
        busy: Fraction of the time in which engines have work.
        clip_wait_s: Mean wait for a clip, including decoding.
        last_tenth_s: Time of the tail in which the last tenth of the episodes runs.
        tokens: Tokens for the learner.
    """

    seconds: float
    busy: float
    clip_wait_s: float
    last_tenth_s: float
    tokens: float


def simulate_rollout(
    config: SimulationConfig, gpu: GpuModel, engines: int, decoders: int, seed: int = 0
) -> RolloutTimes:
    """Simulate the rollout of one step."""
    return _Simulation(config, gpu, engines, decoders, seed).run()


class _Simulation:
    """Event loop. Groups go to the engine with the fewest episodes; events are in two heaps."""

    def __init__(self, config: SimulationConfig, gpu: GpuModel, engines: int, decoders: int, seed: int) -> None:
        self._config, self._gpu = config, gpu
        rng = random.Random(seed)
        self._queue = deque(
            [_SimulatedEpisode(rng.choice(config.episode_shapes), task) for _ in range(config.group_size)]
            for task in range(config.batch_size)
        )
        self._engines = [_SimulatedEngine(gpu) for _ in range(engines)]
        self._engine_of_task: dict[int, _SimulatedEngine] = {}
        self._cached_tasks: set[int] = set()
        self._decoder_free_at = [0.0] * decoders
        self._now, self._sequence = 0.0, 0
        self._clip_events: list[tuple[float, int, _SimulatedEpisode]] = []
        self._engine_events: list[tuple[float, int, int, _SimulatedEngine]] = []
        self._clip_waits: list[float] = []
        self._end_times: list[float] = []
        self._tokens = 0.0

    def run(self) -> RolloutTimes:
        self._admit()
        while self._clip_events or self._engine_events:
            next_clip = self._clip_events[0][0] if self._clip_events else float("inf")
            next_engine = self._engine_events[0][0] if self._engine_events else float("inf")
            if next_clip <= next_engine:
                self._now, _, episode = heapq.heappop(self._clip_events)
                self._start_prefill(episode)
                continue
            event_time, _, generation, engine = heapq.heappop(self._engine_events)
            if generation == engine.generation:
                self._now = event_time
                self._advance_engine(engine)
        self._end_times.sort()
        return RolloutTimes(
            seconds=self._now,
            busy=sum(engine.busy_s for engine in self._engines) / (len(self._engines) * self._now),
            clip_wait_s=sum(self._clip_waits) / len(self._clip_waits),
            last_tenth_s=self._now - self._end_times[int(0.9 * len(self._end_times))],
            tokens=self._tokens,
        )

    def _schedule_engine(self, engine: _SimulatedEngine) -> None:
        if (event_time := engine.next_event_s()) < float("inf"):
            self._sequence += 1
            heapq.heappush(self._engine_events, (event_time, self._sequence, engine.generation, engine))

    def _schedule_clip(self, ready_at: float, episode: _SimulatedEpisode) -> None:
        self._sequence += 1
        heapq.heappush(self._clip_events, (ready_at, self._sequence, episode))

    def _decode(self, cpu_s: float) -> float:
        """Assign a request to the decoder that is free first; return when it is done."""
        ready_at = max(self._now, heapq.heappop(self._decoder_free_at)) + cpu_s
        heapq.heappush(self._decoder_free_at, ready_at)
        self._clip_waits.append(ready_at - self._now)
        return ready_at

    def _admit(self) -> None:
        while self._queue:
            engine = min(self._engines, key=lambda candidate: candidate.num_episodes)
            if engine.num_episodes >= self._config.max_concurrent_episodes:
                return
            group = self._queue.popleft()
            self._engine_of_task[group[0].task] = engine
            engine.num_episodes += len(group)
            self._tokens += sum(self._config.trajectory_tokens(episode.shape) for episode in group)
            # The samples of a group share one overview.
            ready_at = self._decode(self._config.overview_cpu_s)
            for episode in group:
                self._schedule_clip(ready_at, episode)

    def _start_prefill(self, episode: _SimulatedEpisode) -> None:
        """Prefill decoded frames; later samples of a group hit the prefix cache."""
        config, engine = self._config, self._engine_of_task[episode.task]
        self._advance_engine(engine)
        if episode.turn:
            frames = episode.shape.clip_frames[episode.turn - 1]
            new_tokens = float(config.clip_tokens(frames))
            episode.context += new_tokens
        else:
            cached = episode.task in self._cached_tasks
            self._cached_tasks.add(episode.task)
            prefix = float(config.prefix_tokens)
            new_tokens, frames = (0.0, 0) if cached else (prefix, config.overview_frames)
            episode.context = prefix
        seconds = self._gpu.prefill_s(new_tokens, frames, config.frame_tokens)
        engine.prefill(episode, max(1e-6, seconds))
        self._schedule_engine(engine)

    def _advance_engine(self, engine: _SimulatedEngine) -> None:
        for episode in engine.advance(self._now):
            episode.turn += 1
            if episode.turn < len(episode.shape.turn_tokens):
                self._schedule_clip(self._decode(self._config.zoom_cpu_s), episode)
                continue
            self._end_times.append(self._now)
            engine.num_episodes -= 1
        self._schedule_engine(engine)
        self._admit()
