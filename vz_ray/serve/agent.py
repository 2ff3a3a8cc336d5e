"""A replica: one engine and its decoders, which answer questions by playing them as episodes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vz_ray.clips import ClipPool
from vz_ray.clips.gate import asking_as
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.data.task import Chat
from vz_ray.episode.protocols import FrameSource, Policy, Prompt
from vz_ray.episode.runner import play
from vz_ray.episode.trajectory import (
    EpisodeId,
    Sampled,
    Sampling,
)
from vz_ray.episode.wire import WireFormat, Wording
from vz_ray.observe.deadline import within
from vz_ray.observe.errors import UserError
from vz_ray.observe.records import Badge, about
from vz_ray.rollout.engine import Engine, EngineFailed, Heard
from vz_ray.serve.asking import Answered, Event, Failed, Question
from vz_ray.serve.client_tools import ClientFrames, Replayed, ZoomForClient
from vz_ray.serve.holding import Holding
from vz_ray.serve.telling import Telling, calling, ending, joined
from vz_ray.video.frame import FrameSize, Still, VideoInfo

log = logging.getLogger(__name__)

_END_S = 10.0
"""How long an episode that nobody waits for may take to end."""


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
        self._frames = ClipPool.start(config.clips, Badge(config.name, config.observe.log_format))
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
        holding = self._holding
        return {"version": engine.version, "refused": holding.refused, "playing": holding.count}

    async def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if self._holding.broken:
            raise EngineFailed(self._holding.broken)
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
            await asyncio.wait({playing}, timeout=_END_S)

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
            question = plain(question, self._special)
            told = Telling(question, tell)
            speaker = Speaker(engine, question.sampling.max_tokens, told.spoken if tell else None)
            policy: Policy = speaker
            frames: FrameSource = self._pool
            if question.client_zooms or question.exchanges:
                policy = Replayed(speaker, self._wire, question.exchanges)
                frames = ClientFrames(self._pool, policy, question.task.videos, stop=question.client_zooms)
            game = play(
                question.task,
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
            with asking_as(question.id), about(request=question.id):
                try:
                    trajectory = await within(
                        config.episode_deadline_s, game, who=self._name, what=f"request {question.id}"
                    )
                except ZoomForClient as asked:
                    assert speaker.prompt is not None  # it has asked
                    took = time.monotonic() - began
                    end = calling(
                        asked, speaker.prompt, speaker.said, self._wire, version=engine.version, seconds=took
                    )
                    return told.events, end
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


def rules(config: EpisodeConfig, max_zooms: int | None) -> EpisodeConfig:
    """An episode's limits, with no more zooms than were asked for."""
    if max_zooms is None or max_zooms + 1 >= config.max_rounds:
        return config
    return replace(config, max_rounds=max_zooms + 1)


def plain(question: Question, special: Sequence[str]) -> Question:
    """`question` with texts that are only text: a model's special tokens in them are broken up.

    Else a text could hold the end of its own message, and the beginning of another.
    """

    def clean(text: str) -> str:
        for token in special:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    task = question.task
    past = tuple((clean(asked), clean(answer)) for asked, answer in task.chat.past)
    exchanges = tuple(
        replace(one, arguments=clean(one.arguments), reasoning=clean(one.reasoning))
        for one in question.exchanges
    )
    task = replace(task, question=clean(task.question), chat=Chat(clean(task.chat.system), past))
    return replace(question, task=task, exchanges=exchanges)
