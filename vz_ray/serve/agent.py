"""A replica: one engine and its decoders, which answer questions by playing them as episodes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.decode import DecodePool
from vz_ray.decode.admission import request_owner
from vz_ray.env.chat_format import ChatFormat, PromptTemplate
from vz_ray.env.episode_runner import run_episode
from vz_ray.env.protocols import FrameSource, Policy, Prompt
from vz_ray.env.task import ChatHistory
from vz_ray.env.trajectory import EpisodeId, SampledAction, SamplingParams
from vz_ray.monitoring.log_context import RunIdentity, log_context
from vz_ray.rollout.vllm_engine import EngineFailedError, TextCallback, VllmEngine
from vz_ray.serve.agent_protocol import AgentEvent, AgentRequest, RequestCompleted, RequestFailed
from vz_ray.serve.client_zoom import ClientFrameSource, ClientZoomRequired, ReplayPolicy
from vz_ray.serve.event_stream import EventTranslator, client_zoom_result, coalesce, episode_result
from vz_ray.serve.weight_swap import WeightSwap
from vz_ray.utils.errors import UserError
from vz_ray.utils.timeouts import with_timeout
from vz_ray.video.frame import FrameSize, ImageRequest, VideoInfo

log = logging.getLogger(__name__)

_END_S = 10.0
"""How long an episode that nobody waits for may take to end."""


@dataclass(slots=True)
class EnginePolicy:
    """The engine as a policy for one request: counts its tokens, and passes on what it says.

    Attributes:
        token_budget: That may still be said, over all turns.
        on_text: Is told the text of a turn so far; None does without.
        turn_token_ids: Tokens of each turn, in order.
        last_prompt: What it read before the last of them.
    """

    engine: VllmEngine
    token_budget: int
    on_text: TextCallback | None = None
    turn_token_ids: list[Sequence[int]] = field(default_factory=list)
    last_prompt: Prompt | None = None

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str
    ) -> SampledAction:
        left = max(1, min(sampling_params.max_tokens, self.token_budget))
        said = await self.engine.generate(
            prompt, replace(sampling_params, max_tokens=left), request_id=request_id, on_text=self.on_text
        )
        self.token_budget -= len(said.token_ids)
        self.turn_token_ids.append(said.token_ids)
        self.last_prompt = prompt
        return said

    @property
    def draft_answer(self) -> Any:
        """As of the engine, for the zoom gate."""
        return self.engine.draft_answer


class Agent:
    """Answers questions; an actor of Ray Serve's, though it knows nothing of that.

    It gets its weights by `reconfigure`, the first time with its start, and later while it answers.
    """

    engine_type: type[VllmEngine] = VllmEngine

    def __init__(self, config: ServeConfig, name: str = "agent") -> None:
        self._config, self._name = config, name
        self._engine: VllmEngine | None = None
        self._frames: DecodePool | None = None
        self._holding = WeightSwap(config, name)

    async def reconfigure(self, weights: dict[str, Any]) -> None:
        """Takes a set of weights: `{"model": directory, "version": number}`.

        Those of another architecture are refused, and the ones at hand stay; requests under way end with
        the weights that they began with, unless they take longer than `drain_s`.
        """
        model, version = str(weights["model"]), int(weights["version"])
        if self._engine is None:
            await self._start(model, version)
        elif version != self._engine.version:
            await self._holding.swap(self._engine, model, version)

    async def _start(self, model: str, version: int) -> None:
        from transformers import AutoTokenizer

        config = self._config
        self._frames = DecodePool.start(config.clips, RunIdentity(config.name, config.monitoring.log_format))
        self._engine = await self.engine_type.start(
            model,
            config.engine,
            name=self._name,
            log_file=Path(config.log_dir) / f"{self._name}.engine.log",
            version=version,
            training=False,
            start_timeout_s=config.timeouts.engine_start_s,
            turn_timeout_s=config.timeouts.turn_s,
        )
        await self._frames.wait_until_ready()
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        self._special = [str(token) for token in tokenizer.get_added_vocab()]
        wording = PromptTemplate.load(config.episode.prompt)
        self._wire = ChatFormat(tokenizer, wording, compat=config.episode.chat_format == "compat")
        self._holding.set_initial(model, version)

    async def ready(self) -> dict[str, Any]:
        """The weights it answers with; raises where it cannot answer."""
        engine = self._engine
        if engine is None:
            raise UserError(f"{self._name} has not started yet")
        await engine.check_health()
        holding = self._holding
        return {"version": engine.version, "refused": holding.swap_error, "playing": holding.active_requests}

    async def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if self._holding.engine_error:
            raise EngineFailedError(self._holding.engine_error)
        if self._engine is not None:
            await self._engine.check_health()

    async def probe(self, uri: str) -> VideoInfo:
        """What a video is; raises a `VideoError` where it is none."""
        return await self._pool.probe(uri)

    async def check_image(self, uri: str) -> None:
        """Decodes an image; raises a `VideoError` where it is none."""
        await self._pool.overview(uri, ImageRequest(), FrameSize())

    async def answer(self, question: AgentRequest) -> list[AgentEvent]:
        """Plays a question; everything that happened, the last of it `RequestCompleted` or `RequestFailed`.

        Raises:
            Overdue: It took longer than `episode_deadline_s`, or a part of it than its own deadline.
        """
        told, end = await self._play(question, None)
        return [*told, end]

    async def stream(self, question: AgentRequest) -> AsyncGenerator[list[AgentEvent]]:
        """Plays a question, and tells what happens when it does; the last event is `RequestCompleted` or `RequestFailed`.

        What happens while the last events are on their way comes in one batch. Leaving it ends the
        episode, in the engine and the decoders too.
        """
        told: asyncio.Queue[AgentEvent | None] = asyncio.Queue()
        playing = asyncio.create_task(self._play(question, told.put_nowait))
        playing.add_done_callback(lambda _: told.put_nowait(None))
        try:
            while (event := await told.get()) is not None:
                batch = [event]
                while not told.empty() and (further := told.get_nowait()) is not None:
                    batch = coalesce(batch, further)
                yield batch
                if playing.done():
                    break
            yield [(await playing)[1]]
        finally:
            playing.cancel()
            await asyncio.wait({playing}, timeout=_END_S)

    async def _play(
        self, question: AgentRequest, tell: Callable[[AgentEvent], None] | None
    ) -> tuple[list[AgentEvent], RequestCompleted | RequestFailed]:
        engine, config = self._engine, self._config
        if engine is None:
            raise UserError(f"{self._name} has not started yet")
        async with self._holding.request_slot():
            if question.version not in (None, engine.version):
                return [], RequestFailed(
                    f"version {question.version} is not served; version {engine.version} is",
                    "model_not_found",
                    404,
                )
            question = escape_special_tokens(question, self._special)
            told = EventTranslator(question, tell)
            speaker = EnginePolicy(engine, question.sampling.max_tokens, told.on_text if tell else None)
            policy: Policy = speaker
            frames: FrameSource = self._pool
            if question.client_side_zooms or question.replayed_zooms:
                policy = ReplayPolicy(speaker, self._wire, question.replayed_zooms)
                frames = ClientFrameSource(
                    self._pool, policy, question.task.videos, stop_at_new_zoom=question.client_side_zooms
                )
            game = run_episode(
                question.task,
                policy,
                frames,
                self._wire,
                limit_zooms(config.episode, question.max_zooms),
                episode_id=EpisodeId(0, question.id, 0),
                sampling_params=question.sampling,
                worker=self._name,
                on_event=told.on_env_event,
            )
            began = time.monotonic()
            with request_owner(question.id), log_context(request=question.id):
                try:
                    trajectory = await with_timeout(
                        game, config.timeouts.episode_s, target=self._name, operation=f"request {question.id}"
                    )
                except ClientZoomRequired as asked:
                    assert speaker.last_prompt is not None  # it has asked
                    took = time.monotonic() - began
                    end = client_zoom_result(
                        asked,
                        speaker.last_prompt,
                        speaker.turn_token_ids,
                        self._wire,
                        version=engine.version,
                        seconds=took,
                    )
                    return told.events, end
            return told.events, episode_result(trajectory, engine.version)

    async def shutdown(self) -> None:
        """Ends the engine's process and the decoders."""
        if self._engine is not None:
            await self._engine.shutdown()
        if self._frames is not None:
            self._frames.close()

    @property
    def _pool(self) -> DecodePool:
        if self._frames is None:
            raise UserError(f"{self._name} has not started yet")
        return self._frames


def limit_zooms(config: EpisodeConfig, max_zooms: int | None) -> EpisodeConfig:
    """An episode's limits, with no more zooms than were asked for."""
    if max_zooms is None or max_zooms + 1 >= config.max_rounds:
        return config
    return replace(config, max_rounds=max_zooms + 1)


def escape_special_tokens(question: AgentRequest, special: Sequence[str]) -> AgentRequest:
    """`question` with texts that are only text: a model's special tokens in them are broken up.

    Else a text could hold the end of its own message, and the beginning of another.
    """

    def clean(text: str) -> str:
        for token in special:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    task = question.task
    past = tuple((clean(asked), clean(answer)) for asked, answer in task.chat_history.turns)
    exchanges = tuple(
        replace(one, arguments=clean(one.arguments), reasoning=clean(one.reasoning))
        for one in question.replayed_zooms
    )
    task = replace(
        task, question=clean(task.question), chat_history=ChatHistory(clean(task.chat_history.system), past)
    )
    return replace(question, task=task, replayed_zooms=exchanges)
