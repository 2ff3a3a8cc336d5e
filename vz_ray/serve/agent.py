"""Agent replica: one vLLM engine and its decoders, which answer requests by running episodes."""

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
from vz_ray.data.chat_format_loader import load_chat_format
from vz_ray.decode import DecodePool
from vz_ray.decode.admission import request_owner
from vz_ray.env.episode_runner import run_episode
from vz_ray.env.protocols import FrameSource, Policy, Prompt
from vz_ray.env.task import ChatHistory
from vz_ray.env.trajectory import EpisodeId, SampledAction, SamplingParams
from vz_ray.monitoring.log_context import RunIdentity, log_context
from vz_ray.rollout.vllm_engine import TextCallback, VllmEngine
from vz_ray.rollout.vllm_process import EngineFailedError
from vz_ray.serve.agent_protocol import AgentEvent, AgentRequest, RequestCompleted, RequestFailed
from vz_ray.serve.client_zoom import ClientFrameSource, ClientZoomRequired, ReplayPolicy
from vz_ray.serve.streaming import EventTranslator, client_zoom_result, coalesce, episode_result
from vz_ray.serve.weight_swap import WeightSwap
from vz_ray.utils.errors import UserError
from vz_ray.utils.timeouts import with_timeout
from vz_ray.video.frame import ImageRequest, VideoInfo

log = logging.getLogger(__name__)

_CANCEL_TIMEOUT_S = 10.0
"""Maximum wait for a cancelled episode to end."""


@dataclass(slots=True)
class EnginePolicy:
    """Policy of one request: generates with the engine and counts the tokens of all turns.

    Attributes:
        engine: The replica's engine.
        token_budget: Tokens left for all further turns.
        on_text: Callback with the text of the current turn so far; optional.
        turn_token_ids: Sampled tokens of each turn.
        last_prompt: Prompt of the last turn.
    """

    engine: VllmEngine
    token_budget: int
    on_text: TextCallback | None = None
    turn_token_ids: list[Sequence[int]] = field(default_factory=list)
    last_prompt: Prompt | None = None

    async def generate(self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str) -> SampledAction:
        max_tokens = max(1, min(sampling_params.max_tokens, self.token_budget))
        action = await self.engine.generate(
            prompt,
            replace(sampling_params, max_tokens=max_tokens),
            request_id=request_id,
            on_text=self.on_text,
        )
        self.token_budget -= len(action.token_ids)
        self.turn_token_ids.append(action.token_ids)
        self.last_prompt = prompt
        return action

    @property
    def draft_answer(self) -> Any:
        """The engine's `draft_answer`, for the zoom gate."""
        return self.engine.draft_answer


class Agent:
    """Answers requests with one engine. Independent of Ray Serve; see `AgentReplica`.

    Ray Serve calls `reconfigure` with the first weights at start-up, and with new weights while the
    replica serves.
    """

    engine_type: type[VllmEngine] = VllmEngine

    def __init__(self, config: ServeConfig, name: str = "agent") -> None:
        self._config, self._name = config, name
        self._engine: VllmEngine | None = None
        self._decode_pool: DecodePool | None = None
        self._weight_swap = WeightSwap(config, name)

    async def reconfigure(self, weights: dict[str, Any]) -> None:
        """Load weights, given as `{"model": directory, "version": number}`.

        Weights of another architecture are refused and the current ones stay. Running requests finish
        with the old weights, unless they take longer than `timeouts.drain_s`.

        Raises:
            UserError: `weights` name no model.
        """
        model, version = str(weights["model"]), int(weights["version"])
        if not model:
            raise UserError("user_config has no model; set model and version of the deployment Agent")
        if self._engine is None:
            await self._start(model, version)
        elif version != self._engine.version:
            await self._weight_swap.swap(self._engine, model, version)

    async def _start(self, model: str, version: int) -> None:
        config = self._config
        self._chat_format = load_chat_format(model, config.episode)  # fail before the engine starts
        self._special_tokens = [str(token) for token in self._chat_format.tokenizer.get_added_vocab()]
        identity = RunIdentity(config.name, config.monitoring.log_format)
        self._decode_pool = DecodePool.start(config.clips, identity)
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
        await self._decode_pool.wait_until_ready()
        self._weight_swap.set_initial(model, version)

    async def ready(self) -> dict[str, Any]:
        """Return the weight version, the last swap error and the number of running requests.

        Raises:
            UserError: The replica has not started.
            EngineFailedError: The engine is not healthy.
        """
        engine, weights = self._engine, self._weight_swap
        if engine is None:
            raise UserError(f"{self._name} has not started yet")
        await engine.check_health()
        return {
            "version": engine.version,
            "swap_error": weights.swap_error,
            "active_requests": weights.active_requests,
        }

    async def check_health(self) -> None:
        """Raise if the replica is not healthy; Ray Serve then replaces the replica."""
        if self._weight_swap.engine_error:
            raise EngineFailedError(self._weight_swap.engine_error)
        if self._engine is not None:
            await self._engine.check_health()

    async def probe(self, uri: str) -> VideoInfo:
        """Return metadata of a video; raises `VideoError` if it cannot be read."""
        return await self._frame_source.probe(uri)

    async def check_image(self, uri: str) -> None:
        """Decode an image as episodes do; raises `VideoError` if it cannot be decoded."""
        frames, episode = self._frame_source, self._config.episode
        size = self._chat_format.grid.frame_size(episode.min_pixels, episode.max_pixels)
        await frames.clip(uri, ImageRequest(), size)

    async def answer(self, request: AgentRequest) -> list[AgentEvent]:
        """Run a request and return all events; the last is `RequestCompleted` or `RequestFailed`.

        Raises:
            StepTimeout: The episode exceeded `timeouts.episode_s`, or one of its parts its own timeout.
        """
        events, result = await self._run_request(request, None)
        return [*events, result]

    async def stream(self, request: AgentRequest) -> AsyncGenerator[list[AgentEvent]]:
        """Run a request and yield events as they happen, in batches.

        The last event is `RequestCompleted` or `RequestFailed`. Events that arrive while the consumer is
        busy form one batch. Closing the generator cancels the episode in the engine and the decoders.
        """
        queue: asyncio.Queue[AgentEvent | None] = asyncio.Queue()
        episode = asyncio.create_task(self._run_request(request, queue.put_nowait))
        episode.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (event := await queue.get()) is not None:
                batch = [event]
                while not queue.empty() and (next_event := queue.get_nowait()) is not None:
                    batch = coalesce(batch, next_event)
                yield batch
                if episode.done():
                    break
            yield [(await episode)[1]]
        finally:
            episode.cancel()
            await asyncio.wait({episode}, timeout=_CANCEL_TIMEOUT_S)

    async def _run_request(
        self, request: AgentRequest, emit: Callable[[AgentEvent], None] | None
    ) -> tuple[list[AgentEvent], RequestCompleted | RequestFailed]:
        engine, config = self._engine, self._config
        if engine is None:
            raise UserError(f"{self._name} has not started yet")
        async with self._weight_swap.request_slot():
            if request.version not in (None, engine.version):
                return [], RequestFailed(
                    f"version {request.version} is not served; version {engine.version} is",
                    "model_not_found",
                    404,
                )
            request = escape_special_tokens(request, self._special_tokens)
            translator = EventTranslator(request, emit, self._chat_format.opens_reasoning)
            engine_policy = EnginePolicy(engine, request.sampling.max_tokens, translator.on_text if emit else None)
            policy: Policy = engine_policy
            frame_source: FrameSource = self._frame_source
            if request.client_side_zooms or request.replayed_zooms:
                policy = ReplayPolicy(engine_policy, self._chat_format, request.replayed_zooms)
                frame_source = ClientFrameSource(
                    frame_source, policy, request.task.videos, stop_at_new_zoom=request.client_side_zooms
                )
            episode = run_episode(
                request.task,
                policy,
                frame_source,
                self._chat_format,
                limit_zooms(config.episode, request.max_zooms),
                episode_id=EpisodeId(0, request.id, 0),
                sampling_params=request.sampling,
                worker=self._name,
                on_event=translator.on_env_event,
            )
            started = time.monotonic()
            with request_owner(request.id), log_context(request=request.id):
                try:
                    trajectory = await with_timeout(
                        episode,
                        config.timeouts.episode_s,
                        target=self._name,
                        operation=f"request {request.id}",
                    )
                except ClientZoomRequired as client_zoom:
                    assert engine_policy.last_prompt is not None  # the zoom was sampled from it
                    result = client_zoom_result(
                        client_zoom,
                        engine_policy.last_prompt,
                        engine_policy.turn_token_ids,
                        self._chat_format,
                        version=engine.version,
                        seconds=time.monotonic() - started,
                    )
                    return translator.events, result
            return translator.events, episode_result(trajectory, engine.version)

    async def shutdown(self) -> None:
        """Terminate the engine process and the decoders."""
        if self._engine is not None:
            await self._engine.shutdown()
        if self._decode_pool is not None:
            self._decode_pool.close()

    @property
    def _frame_source(self) -> DecodePool:
        if self._decode_pool is None:
            raise UserError(f"{self._name} has not started yet")
        return self._decode_pool


def limit_zooms(config: EpisodeConfig, max_zooms: int | None) -> EpisodeConfig:
    """Return `config` with at most `max_zooms` zooms; never more than the agent's own limit."""
    if max_zooms is None or max_zooms + 1 >= config.max_rounds:
        return config
    return replace(config, max_rounds=max_zooms + 1)


def escape_special_tokens(request: AgentRequest, special_tokens: Sequence[str]) -> AgentRequest:
    """Return `request` with special tokens of the model split by a space in all texts.

    Otherwise a text could end its own message and begin another.
    """

    def escape(text: str) -> str:
        for token in special_tokens:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    task = request.task
    turns = tuple((escape(question), escape(answer)) for question, answer in task.chat_history.turns)
    task = replace(
        task,
        question=escape(task.question),
        chat_history=ChatHistory(escape(task.chat_history.system), turns),
    )
    replayed_zooms = tuple(
        replace(zoom, arguments=escape(zoom.arguments), reasoning=escape(zoom.reasoning))
        for zoom in request.replayed_zooms
    )
    return replace(request, task=task, replayed_zooms=replayed_zooms)
