"""A replica: one engine and its decoders, which answer questions by playing them as episodes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vz_ray.clips import ClipPool
from vz_ray.clips.gate import asking_as
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.data.task import Chat, Task
from vz_ray.episode import events
from vz_ray.episode.protocols import FrameSource, Policy, Prompt
from vz_ray.episode.runner import play
from vz_ray.episode.trajectory import (
    EpisodeId,
    Sampled,
    Sampling,
    Status,
    Trajectory,
    Turn,
    visual_tokens,
)
from vz_ray.episode.wire import WireFormat, Wording, grid_of
from vz_ray.observe.deadline import within
from vz_ray.observe.errors import UserError
from vz_ray.rollout.engine import Engine, Heard
from vz_ray.serve import asking
from vz_ray.serve.asking import Answered, Event, Failed, Question, Said
from vz_ray.serve.client_tools import ClientFrames, Replayed, ZoomForClient
from vz_ray.serve.holding import Holding
from vz_ray.serve.speech import Speech
from vz_ray.video.frame import Clip, Frame, FrameSize, Still, VideoInfo, Zoom

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Speaker:
    """The engine as a policy for one request: counts its tokens, and passes on what it says.

    Attributes:
        tokens: That may still be said, over all turns.
        spoke: Is told the text of a turn so far; None does without.
        said: Tokens of each turn, in order.
        prompt: What it read before the last of them.
    """

    engine: Engine
    tokens: int
    spoke: Heard | None = None
    said: list[Sequence[int]] = field(default_factory=list)
    prompt: Prompt | None = None

    async def act(self, prompt: Prompt, sampling: Sampling, *, request: str) -> Sampled:
        left = max(1, min(sampling.max_tokens, self.tokens))
        said = await self.engine.act(
            prompt, replace(sampling, max_tokens=left), request=request, heard=self.spoke
        )
        self.tokens -= len(said.token_ids)
        self.said.append(said.token_ids)
        self.prompt = prompt
        return said

    @property
    def draft(self) -> Any:
        """As of the engine, for the zoom gate."""
        return self.engine.draft


class Agent:
    """Answers questions; an actor of Ray Serve's, though it knows nothing of that.

    It gets its weights by `reconfigure`, the first time with its start, and later while it answers.
    """

    engine_type: type[Engine] = Engine

    def __init__(self, config: ServeConfig, name: str = "agent") -> None:
        self._config, self._name = config, name
        self._engine: Engine | None = None
        self._frames: ClipPool | None = None
        self._holding = Holding(config, name)

    async def reconfigure(self, weights: dict[str, Any]) -> None:
        """Takes a set of weights: `{"model": directory, "version": number}`.

        Those of another architecture are refused, and the ones at hand stay; requests under way end with
        the weights that they began with, unless they take longer than `drain_s`.
        """
        model, version = str(weights["model"]), int(weights["version"])
        if self._engine is None:
            await self._start(model, version)
        elif version != self._engine.version:
            await self._holding.take(self._engine, model, version)

    async def _start(self, model: str, version: int) -> None:
        from transformers import AutoTokenizer

        config = self._config
        self._frames = ClipPool.start(config.clips)
        self._engine = await self.engine_type.start(
            model,
            config.engine,
            name=self._name,
            log=Path(config.logs) / f"{self._name}.engine.log",
            version=version,
            training=False,
            start_deadline_s=config.start_deadline_s,
            turn_deadline_s=config.turn_deadline_s,
        )
        await self._frames.ready()
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        self._special = [str(token) for token in tokenizer.get_added_vocab()]
        wording = Wording.load(config.episode.prompt)
        self._wire = WireFormat(tokenizer, wording, compat=config.episode.format == "compat")
        self._holding.holds(model, version)

    async def ready(self) -> dict[str, Any]:
        """The weights it answers with; raises where it cannot answer."""
        engine = self._engine
        if engine is None:
            raise UserError(f"{self._name} has not started yet")
        await engine.check()
        return {"version": engine.version, "refused": self._holding.refused}

    async def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if self._engine is not None:
            await self._engine.check()

    async def probe(self, uri: str) -> VideoInfo:
        """What a video is; raises a `VideoError` where it is none."""
        return await self._pool.probe(uri)

    async def look(self, uri: str) -> None:
        """Decodes an image; raises a `VideoError` where it is none."""
        await self._pool.overview(uri, Still(), FrameSize())

    async def answer(self, question: Question) -> list[Event]:
        """Plays a question; everything that happened, the last of it `Answered` or `Failed`.

        Raises:
            Overdue: It took longer than `episode_deadline_s`, or a part of it than its own deadline.
        """
        told, end = await self._play(question, None)
        return [*told, end]

    async def stream(self, question: Question) -> AsyncGenerator[list[Event]]:
        """Plays a question, and tells what happens when it does; the last event is `Answered` or `Failed`.

        What happens while the last events are on their way comes in one batch. Leaving it ends the
        episode, in the engine and the decoders too.
        """
        told: asyncio.Queue[Event | None] = asyncio.Queue()
        playing = asyncio.create_task(self._play(question, told.put_nowait))
        playing.add_done_callback(lambda _: told.put_nowait(None))
        try:
            while (event := await told.get()) is not None:
                batch = [event]
                while not told.empty() and (further := told.get_nowait()) is not None:
                    batch = joined(batch, further)
                yield batch
                if playing.done():
                    break
            yield [(await playing)[1]]
        finally:
            playing.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await playing

    async def _play(
        self, question: Question, tell: Callable[[Event], None] | None
    ) -> tuple[list[Event], Answered | Failed]:
        engine, config = self._engine, self._config
        if engine is None:
            raise UserError(f"{self._name} has not started yet")
        async with self._holding.playing():
            if question.version not in (None, engine.version):
                return [], Failed(
                    f"version {question.version} is not served; version {engine.version} is",
                    "model_not_found",
                    404,
                )
            told = Telling(question, tell)
            speaker = Speaker(engine, question.sampling.max_tokens, told.spoken if tell else None)
            policy: Policy = speaker
            frames: FrameSource = self._pool
            if question.client_zooms or question.exchanges:
                policy = Replayed(speaker, self._wire, question.exchanges)
                frames = ClientFrames(
                    self._pool, question.exchanges, question.task.videos, stop=question.client_zooms
                )
            game = play(
                plain(question.task, self._special),
                policy,
                frames,
                self._wire,
                rules(config.episode, question.max_zooms),
                id=EpisodeId(0, question.id, 0),
                sampling=question.sampling,
                worker=self._name,
                watcher=told.happened,
            )
            began = time.monotonic()
            with asking_as(question.id):
                try:
                    trajectory = await within(
                        config.episode_deadline_s, game, who=self._name, what=f"request {question.id}"
                    )
                except ZoomForClient as asked:
                    return told.events, calling(
                        asked, speaker, self._wire, engine.version, time.monotonic() - began
                    )
            return told.events, ending(trajectory, engine.version)

    async def shutdown(self) -> None:
        """Ends the engine's process and the decoders."""
        if self._engine is not None:
            await self._engine.shutdown()
        if self._frames is not None:
            self._frames.close()

    @property
    def _pool(self) -> ClipPool:
        if self._frames is None:
            raise UserError(f"{self._name} has not started yet")
        return self._frames


@dataclass
class Telling:
    """Turns what happens in an episode into what its client is told."""

    question: Question
    tell: Callable[[Event], None] | None

    def __post_init__(self) -> None:
        self.events: list[Event] = []
        self._turn, self._speech = 0, Speech()

    def happened(self, event: events.Event) -> None:
        match event:
            case events.Begun(videos, overviews):
                for number, (video, clip) in enumerate(zip(videos, overviews, strict=True)):
                    self._add(asking.Overview(number, video.duration_s, self._shown(clip)))
            case events.Asked(turn, zoom):
                self._flush(over=True)
                self._add(asking.Zooming(turn, zoom.video, (zoom.start_s, zoom.end_s), zoom.fps))
            case events.Ended(number, turn, clip):
                self._flush(over=True)
                self._turn, self._speech = number + 1, Speech()
                if turn.zoom is not None:
                    self._add(self._zoomed(number, turn, clip))

    def spoken(self, so_far: str) -> None:
        self._so_far = so_far
        self._flush()

    def _flush(self, *, over: bool = False) -> None:
        for text, answer in self._speech.hear(getattr(self, "_so_far", ""), over=over):
            self._add(asking.Said(self._turn, text, answer))
        if over:
            self._so_far = ""

    def _zoomed(self, number: int, turn: Turn, clip: Clip | None) -> asking.Zoomed:
        zoom = turn.zoom if isinstance(turn.zoom, Zoom) else None
        return asking.Zoomed(
            turn=number,
            video=zoom.video if zoom else 0,
            segment=(zoom.start_s, zoom.end_s) if zoom else None,
            fps=zoom.fps if zoom else None,
            frames=self._shown(clip) if clip else (),
            refused="" if turn.zoom is None or zoom else str(getattr(turn.zoom, "message", "")),
            reasoning=reasoning_of(turn.text),
            seconds=turn.seconds,
        )

    def _shown(self, clip: Clip) -> tuple[asking.Shown, ...]:
        return tuple(asking.Shown(frame.pts_s, self._image(frame)) for frame in clip.frames)

    def _image(self, frame: Frame) -> str:
        from vz_ray.video.image import data_uri

        return data_uri(frame.rgb, self.question.thumbnails) if self.question.thumbnails else ""

    def _add(self, event: Event) -> None:
        self.events.append(event)
        if self.tell is not None:
            self.tell(event)


def joined(batch: list[Event], event: Event) -> list[Event]:
    """`batch` and one more; text that goes on is put together."""
    last = batch[-1]
    if isinstance(last, Said) and isinstance(event, Said) and last.answer == event.answer:
        return [*batch[:-1], replace(last, text=last.text + event.text)]
    return [*batch, event]


def rules(config: EpisodeConfig, max_zooms: int | None) -> EpisodeConfig:
    """An episode's limits, with no more zooms than were asked for."""
    if max_zooms is None or max_zooms + 1 >= config.max_rounds:
        return config
    return replace(config, max_rounds=max_zooms + 1)


def plain(task: Task, special: list[str]) -> Task:
    """`task` with texts that are only text: a model's special tokens in them are broken up.

    Else a question could hold the end of its own message, and the beginning of another.
    """

    def clean(text: str) -> str:
        for token in special:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    past = tuple((clean(asked), clean(answer)) for asked, answer in task.chat.past)
    return replace(task, question=clean(task.question), chat=Chat(clean(task.chat.system), past))


def reasoning_of(text: str) -> str:
    """What a turn says beside its zoom and its answer."""
    speech = Speech()
    speech.hear(text, over=True)
    return speech.reasoning.strip()


def calling(
    asked: ZoomForClient, speaker: Speaker, wire: WireFormat, version: int, seconds: float
) -> Answered:
    """The end of a request whose next zoom is the client's."""
    assert speaker.prompt is not None
    read, frames = speaker.prompt.compact_ids, speaker.prompt.frames
    return Answered(
        text="",
        reasoning=reasoning_of(wire.text_of(speaker.said[-1])),
        status="zoom",
        version=version,
        prompt_tokens=len(read) + sum(visual_tokens(grid_of(frame)) - 1 for frame in frames),
        sampled_tokens=sum(map(len, speaker.said)),
        frames=len(frames),
        zooms=0,
        seconds=seconds,
        call=asked.arguments,
    )


def ending(trajectory: Trajectory, version: int) -> Answered | Failed:
    """What the client is told of a played episode."""
    if trajectory.status is Status.FAILED:
        # The whole error names paths of the server's.
        return Failed(f"{trajectory.extra['in_short']}", "invalid_media")
    if not trajectory.turns:
        return Failed(
            "the question and the video's overview are longer than the context", "context_length_exceeded"
        )
    last = trajectory.turns[-1]
    gate = trajectory.extra.get("gate")
    return Answered(
        text=trajectory.answer if trajectory.answer is not None else reasoning_of(last.text),
        reasoning=reasoning_of(last.text) if trajectory.answer is not None else "",
        status=trajectory.status.value,
        version=max(trajectory.weight_versions, default=version),
        prompt_tokens=trajectory.length - sum(len(turn.action.token_ids) for turn in trajectory.turns),
        sampled_tokens=sum(len(turn.action.token_ids) for turn in trajectory.turns),
        frames=len(trajectory.refs),
        zooms=len(trajectory.zooms),
        seconds=trajectory.seconds,
        gated=isinstance(gate, dict) and gate.get("zoom") is False,
    )
