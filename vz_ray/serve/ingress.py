"""The front door: checks requests, hands them to agents, streams their replies.

It has no model and no pixels, so that it stays small and quick; several of them
may stand behind one address.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ReplicaState
from starlette.responses import JSONResponse, Response

from vz_ray.config.serve import ServeConfig
from vz_ray.decode.reader_factory import build_download_rules
from vz_ray.env.task import AnswerType, ChatHistory, Task
from vz_ray.env.trajectory import SamplingParams
from vz_ray.monitoring.log_context import RunIdentity, log_context
from vz_ray.monitoring.logging_config import configure_replica_logging
from vz_ray.serve import openai_response
from vz_ray.serve.access_control import install_access_control, request_owner
from vz_ray.serve.agent_protocol import AgentEvent, AgentRequest, RequestCompleted, RequestFailed, TextDelta
from vz_ray.serve.api_errors import ApiError, not_found, overloaded, request_id, server_error
from vz_ray.serve.api_keys import ApiKeyStore
from vz_ray.serve.client_zoom import ReplayedZoom
from vz_ray.serve.files_api import files_router as files_router
from vz_ray.serve.files_api import open_store
from vz_ray.serve.media_resolver import MediaResolver, MediaStreamingResponse
from vz_ray.serve.metrics import RequestTimer, ServeMetrics
from vz_ray.serve.openai_request import ChatCompletionRequest as ChatRequest
from vz_ray.serve.openai_request import (
    Conversation,
    ToolExchange,
    parse_conversation,
    parse_model_name,
    parse_request,
)
from vz_ray.serve.openai_response import CompletionBuilder
from vz_ray.serve.page import page_router
from vz_ray.utils.timeouts import StepTimeout, with_timeout
from vz_ray.video.frame import VideoInfo

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 10.0
"""How long an agent may take to say that it is well."""
REQUEST_SLACK_S = 30.0
"""How much longer than an episode a request may take: waiting for a place is not part of it."""
_ATTEMPTS = 2
"""Agents that a request is tried on; one that died took nothing with it that cannot be done again."""


@dataclass
class StreamState:
    """A stream under way.

    Attributes:
        include_usage: It is to end with token counts.
        answer_streamed: Some of the answer's text has been sent.
    """

    request: AgentRequest
    builder: CompletionBuilder
    timer: RequestTimer
    include_usage: bool
    answer_streamed: bool = False


@dataclass
class Ingress:
    """One process of the front door.

    Attributes:
        agent: Handle of the agents.
    """

    config: ServeConfig
    agent: DeploymentHandle

    def __post_init__(self) -> None:
        self._created = int(time.time())
        self._measures = ServeMetrics()
        self._state: dict[str, Any] = {}

    def build(self) -> FastAPI:
        """The application, made where it runs."""
        config = self.config
        app = FastAPI(
            title="vz_ray", docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._while_alive
        )
        keys = ApiKeyStore.from_config(config.access.keys_file, config.access.keys_env, os.environ)
        self._store = open_store(config.files, config.access)
        self._rules = build_download_rules(config.clips)
        app.include_router(self._routes())
        app.include_router(files_router(self._store, self._probe, self._look))
        app.include_router(page_router())
        install_access_control(app, config.access, keys)
        return app

    @asynccontextmanager
    async def _while_alive(self, _: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(self._store.sweep_periodically())
        yield
        sweeping.cancel()

    def _routes(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/v1/chat/completions", self.chat_completions, methods=["POST"])
        router.add_api_route("/v1/models", self.list_models, methods=["GET"])
        router.add_api_route("/v1/models/{model}", self.get_model, methods=["GET"])
        router.add_api_route("/health", self.health, methods=["GET"])
        router.add_api_route("/ready", self.ready, methods=["GET"])
        router.add_api_route("/metrics", self.metrics, methods=["GET"])
        return router

    # -- routes -------------------------------------------------------------------

    async def chat_completions(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        asked = parse_request(await request.body())
        conversation = parse_conversation(asked.messages, self.config)
        version = parse_model_name(asked.model, self.config.name)
        async with AsyncExitStack() as stack:
            whose, roots = request_owner(request), self.config.files.allowed_dirs
            media = await stack.enter_async_context(MediaResolver(self._store, whose, self._rules, roots))
            question = AgentRequest(
                id=request_id(request.scope),
                task=await self._task(conversation, media),
                sampling=self._sampling(asked),
                max_zooms=asked.vz_ray.max_zooms,
                thumbnail_size=asked.vz_ray.thumbnails,
                version=version,
                replayed_zooms=tuple(
                    [await resolve_tool_exchange(one, media) for one in conversation.tool_exchanges]
                ),
                client_side_zooms=asked.client_side_zooms,
            )
            course = stack.enter_context(self._measures.track_request())
            reply = CompletionBuilder(f"chatcmpl-{uuid.uuid4().hex}", self.config.name, int(time.time()))
            if not asked.stream:
                return JSONResponse(await self._whole(question, reply, course))
            batches = self._batches(question)
            stack.push_async_callback(batches.aclose)
            # What is refused before anything has happened is refused with a status of its own.
            first = await self._first(batches, course)
            # The media are kept until the stream ends.
            rest = stack.pop_all()
        told = StreamState(question, reply, course, include_usage=asked.include_usage)
        lines = self._lines(first, batches, told)
        return MediaStreamingResponse(lines, rest, {"x-accel-buffering": "no"})

    async def list_models(self) -> dict[str, Any]:
        """`GET /v1/models`: the agent, and the weights that it answers with."""
        state = await self._agent_state()
        return {"object": "list", "data": [self._card(self.config.name, state), self._card_of(state)]}

    async def get_model(self, model: str) -> dict[str, Any]:
        """`GET /v1/models/{model}`."""
        version = parse_model_name(model, self.config.name)
        state = await self._agent_state()
        if version not in (None, state["version"]):
            raise not_found(f"version {version} is not served; version {state['version']} is", "get_model")
        return self._card(model, state)

    async def health(self) -> dict[str, str]:
        """`GET /health`: this process runs."""
        return {"status": "ok"}

    async def ready(self) -> Response:
        """`GET /ready`: an agent runs, whether it has a place for a request at the moment or not."""
        running = asyncio.to_thread(count_running_agents, self.agent)
        try:
            count = await with_timeout(
                running, READY_TIMEOUT_S, target="Ray Serve's controller", operation="its count of agents"
            )
        except StepTimeout as error:
            log.warning("%s", error)
            count = 0
        return JSONResponse({"status": "ready", "agents": count}) if count else self._none_ready().response()

    async def metrics(self) -> Response:
        """`GET /metrics`, for Prometheus."""
        return Response(self._measures.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # -- parts ------------------------------------------------------------------

    async def _task(self, conversation: Conversation, media: MediaResolver) -> Task:
        videos: list[str] = []
        pictures: list[str] = []
        for one in conversation.media:
            if one.kind == "file":
                found = await media.resolve_upload(one.url, one.param)
            else:
                found = await media.resolve(one.url, one.kind, one.param)
            (videos if found.modality == "video" else pictures).append(found.uri)
        return Task(
            task_id="",
            video=videos[0] if videos else "",
            question=conversation.question,
            answer="",
            answer_type=AnswerType.MULTIPLE_CHOICE,
            images=tuple(pictures),
            extra_videos=tuple(videos[1:]),
            chat_history=ChatHistory(conversation.system, tuple(conversation.history)),
        )

    def _sampling(self, asked: ChatRequest) -> SamplingParams:
        config = self.config
        most = asked.max_completion_tokens or asked.max_tokens
        return SamplingParams(
            temperature=config.temperature if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            max_tokens=most or config.episode.max_context,
            seed=asked.seed,
        )

    async def _whole(
        self, question: AgentRequest, reply: CompletionBuilder, course: RequestTimer
    ) -> dict[str, Any]:
        try:
            *told, end = await self._answer(question)
        except Exception as error:
            raise self._refusal(error, course) from error
        if isinstance(end, RequestFailed):
            course.outcome = "refused"
            raise openai_response.to_api_error(end)
        assert isinstance(end, RequestCompleted)
        self._ended(question, end, course)
        return reply.completion(told, end)

    async def _answer(self, question: AgentRequest) -> list[AgentEvent]:
        for attempt in range(_ATTEMPTS):
            answer = self.agent.answer.remote(question)
            try:
                events: list[AgentEvent] = await with_timeout(
                    answer, self._seconds, target="the agents", operation=question.id
                )
                return events
            except RayActorError:
                if attempt + 1 == _ATTEMPTS:
                    raise
                with log_context(request=question.id):
                    log.warning("request %s: its agent died; another one is asked", question.id)
            finally:
                answer.cancel()  # does nothing to one that has come
        raise AssertionError("no attempt was made")

    async def _first(
        self, batches: AsyncGenerator[list[AgentEvent]], course: RequestTimer
    ) -> list[AgentEvent]:
        try:
            first = await anext(batches)
        except Exception as error:
            raise self._refusal(error, course) from error
        if isinstance(first[-1], RequestFailed):
            course.outcome = "refused"
            raise openai_response.to_api_error(first[-1])
        return first

    async def _lines(
        self, first: list[AgentEvent], batches: AsyncGenerator[list[AgentEvent]], told: StreamState
    ) -> AsyncIterator[str]:
        """The stream's lines, those of a batch together; ends with an error event where it fails midway."""
        yield openai_response.format_sse(told.builder.first_chunk()) + self._told(first, told)
        try:
            async for batch in batches:
                yield self._told(batch, told)
        except Exception as error:
            refused = self._refusal(error, told.timer)
            yield openai_response.format_sse(refused.body(), refused.retry_after_s)
        yield openai_response.SSE_DONE

    def _told(self, batch: list[AgentEvent], told: StreamState) -> str:
        """The lines of what happened. Raises `ApiError` where that is a failure."""
        lines = []
        for event in batch:
            told.timer.observe_event(event)
            if isinstance(event, RequestFailed):
                told.timer.outcome = "refused"
                raise openai_response.to_api_error(event)
            if isinstance(event, RequestCompleted):
                self._ended(told.request, event, told.timer)
                lines.append(
                    openai_response.format_sse(
                        told.builder.final_chunk(event, answer_streamed=told.answer_streamed)
                    )
                )
                lines += (
                    [openai_response.format_sse(told.builder.usage_chunk(event))]
                    if told.include_usage
                    else []
                )
            else:
                told.answer_streamed |= isinstance(event, TextDelta) and event.is_answer
                lines.append(openai_response.format_sse(told.builder.event_chunk(event)))
        return "".join(lines)

    async def _batches(self, question: AgentRequest) -> AsyncGenerator[list[AgentEvent]]:
        """What happens, tried on another agent where one died before it had said anything."""
        agent, until = self.agent.options(stream=True), time.monotonic() + self._seconds
        for attempt in range(_ATTEMPTS):
            batches, begun = agent.stream.remote(question), False
            try:
                while True:
                    left = max(0.0, until - time.monotonic())
                    batch = anext(batches, None)
                    events: list[AgentEvent] | None = await with_timeout(
                        batch, left, target="the agents", operation=question.id
                    )
                    if events is None:
                        return
                    begun = True
                    yield events
            except RayActorError:
                if begun or attempt + 1 == _ATTEMPTS:
                    raise
                with log_context(request=question.id):
                    log.warning("request %s: its agent died; another one is asked", question.id)
            finally:
                batches.cancel()

    @property
    def _seconds(self) -> float:
        """How long a request may take in all."""
        return self.config.timeouts.episode_s + REQUEST_SLACK_S

    def _ended(self, question: AgentRequest, end: RequestCompleted, course: RequestTimer) -> None:
        course.outcome = end.status
        self._measures.record_completion(end)
        words = f": {question.task.question!r} -> {end.text!r}" if self.config.log_prompts else ""
        with log_context(request=question.id):
            log.info(
                "request %s: %s after %.2f s, %d frames, %d zooms%s",
                question.id, end.status, end.seconds, end.frames, end.zooms, words,
            )  # fmt: skip

    def _refusal(self, error: Exception, course: RequestTimer) -> ApiError:
        """What the client is told of whatever went wrong."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, ApiError):
            return cause
        course.outcome = "error"
        if isinstance(cause, BackPressureError):
            course.outcome = "shed"
            return self._busy()
        if isinstance(cause, RayActorError | DeploymentUnavailableError):
            message = "The agent that played this request has died; try again."
            return ApiError(
                503, message, "server_error", code="agent_lost", retry_after_s=self.config.retry_after_s
            )
        if isinstance(cause, StepTimeout):
            log.warning("%s", cause)
            return server_error("The request took too long, and was given up.", "timeout", 504)
        log.error("a request failed in a way that nobody foresaw", exc_info=error)
        return server_error("The server failed on this request.")

    async def _agent_state(self) -> dict[str, Any]:
        """What an agent says of itself; where all are full, what one said last."""
        try:
            self._state = await with_timeout(
                self.agent.ready.remote(), READY_TIMEOUT_S, target="the agents", operation="a sign of life"
            )
        except BackPressureError as error:
            if not self._state:
                raise self._busy() from error
        except Exception as error:
            log.info("no agent is ready: %s", error)
            raise self._none_ready() from error
        return self._state

    def _none_ready(self) -> ApiError:
        return overloaded("No agent is ready yet.", self.config.retry_after_s, status=503)

    async def _probe(self, path: Path | str) -> VideoInfo:
        """What an uploaded video is; raises a `VideoError` where it is none."""
        info: VideoInfo = await self._opened(self.agent.probe.remote(str(path)))
        return info

    async def _look(self, path: Path | str) -> None:
        """Raises a `VideoError` where an uploaded image is none."""
        await self._opened(self.agent.check_image.remote(str(path)))

    async def _opened(self, answer: Any) -> Any:
        seconds = self.config.clips.timeout_s
        try:
            return await with_timeout(answer, seconds, target="the agents", operation="a look at an upload")
        except RayTaskError as error:
            raise error.cause from None
        except BackPressureError as error:
            raise self._busy() from error

    def _busy(self) -> ApiError:
        waiting = f"{self.config.max_queued_requests} requests are waiting already; try again later."
        return overloaded(waiting, self.config.retry_after_s, status=503)

    def _card(self, id: str, state: dict[str, Any]) -> dict[str, Any]:
        card = {"id": id, "object": "get_model", "created": self._created, "owned_by": "vz_ray"}
        card |= {"version": state["version"]}
        if state["refused"]:
            card["refused"] = state["refused"]
        return card

    def _card_of(self, state: dict[str, Any]) -> dict[str, Any]:
        return self._card(f"{self.config.name}@{state['version']}", state)


def count_running_agents(agent: DeploymentHandle) -> int:
    """How many agents Ray Serve's controller has running; they are not asked, so they may be full."""
    app = serve.status().applications.get(agent.app_name)
    deployment = app.deployments.get(agent.deployment_name) if app else None
    # While one takes other weights, requests wait for it and are answered.
    states = (ReplicaState.RUNNING, ReplicaState.UPDATING)
    return sum(deployment.replica_states.get(state, 0) for state in states) if deployment else 0


async def resolve_tool_exchange(zoomed: ToolExchange, media: MediaResolver) -> ReplayedZoom:
    """A tool call and its reply, with the frames that the client shows resolved."""
    found = [await media.resolve(frame.url, "image", frame.param) for frame in zoomed.frames]
    return ReplayedZoom(
        arguments=zoomed.arguments,
        reasoning=zoomed.reasoning,
        images=tuple(source.uri for source in found),
        times_s=tuple(frame.pts or 0.0 for frame in zoomed.frames),
    )


def configure_ingress_logging(config: ServeConfig) -> str:
    """Sends what this replica logs to its file, with the name of what is served; returns the replica's id."""
    id = str(serve.get_replica_context().replica_id.unique_id)
    configure_replica_logging(id, RunIdentity(config.name, config.monitoring.log_format))
    return id


class IngressReplica(Ingress):
    """An ingress that Ray Serve starts; here, so that its process need not import what agents need."""

    def __init__(self, config: ServeConfig, agent: DeploymentHandle) -> None:
        configure_ingress_logging(config)
        super().__init__(config, agent)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.build()
