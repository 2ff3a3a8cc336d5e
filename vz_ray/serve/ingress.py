"""Ingress: validates requests, forwards them to agent replicas, streams their responses.

The process holds no model and no pixels. Several ingress processes can share one address.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
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
from vz_ray.monitoring.log_context import RunIdentity, log_context
from vz_ray.monitoring.logging_config import configure_replica_logging
from vz_ray.serve.access_control import install_access_control, owner_id
from vz_ray.serve.agent_protocol import AgentEvent, AgentRequest, RequestCompleted, RequestFailed
from vz_ray.serve.api_errors import ApiError, not_found, overloaded, request_id
from vz_ray.serve.api_keys import ApiKeyStore
from vz_ray.serve.chat_request import (
    build_task,
    parse_conversation,
    parse_model_name,
    parse_request,
    resolve_tool_exchange,
    sampling_params,
)
from vz_ray.serve.chat_response import SSE_DONE, CompletionBuilder, format_sse
from vz_ray.serve.files_api import files_router, open_store
from vz_ray.serve.media_resolver import MediaResolver, MediaStreamingResponse
from vz_ray.serve.metrics import RequestTimer, ServeMetrics
from vz_ray.serve.page import page_router
from vz_ray.utils.timeouts import StepTimeout, with_timeout
from vz_ray.video.frame import VideoInfo

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 10.0
"""Timeout of a health query to the agents."""
REQUEST_SLACK_S = 30.0
"""Added to the episode timeout for a whole request: waiting for a replica is not part of the episode."""
_MAX_ATTEMPTS = 2
"""Attempts of a request whose replica dies before it returned anything."""


@dataclass
class StreamState:
    """State of one streamed response.

    Attributes:
        request: The request.
        builder: Builds the chunks.
        timer: Outcome and latencies.
        include_usage: End the stream with token counts.
    """

    request: AgentRequest
    builder: CompletionBuilder
    timer: RequestTimer
    include_usage: bool


@dataclass
class Ingress:
    """HTTP application of one ingress process.

    Attributes:
        config: Configuration of the server.
        agent: Handle of the agent deployment.
    """

    config: ServeConfig
    agent: DeploymentHandle

    def __post_init__(self) -> None:
        self._created = int(time.time())
        self._metrics = ServeMetrics()
        self._last_agent_state: dict[str, Any] = {}

    def build(self) -> FastAPI:
        """Build the FastAPI application. Must run in the process that serves it."""
        config = self.config
        app = FastAPI(title="vz_ray", docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._lifespan)
        keys = ApiKeyStore.from_config(config.access.keys_file, config.access.keys_env, os.environ)
        self._store = open_store(config.files, config.access)
        self._download_rules = build_download_rules(config.clips)
        app.include_router(self._routes())
        app.include_router(files_router(self._store, self._probe_video, self._check_image))
        app.include_router(page_router())
        install_access_control(app, config.access, keys)
        return app

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(self._store.sweep_periodically())
        yield
        sweeper.cancel()

    def _routes(self) -> APIRouter:
        router = APIRouter()
        router.post("/v1/chat/completions")(self.chat_completions)
        router.get("/v1/models")(self.list_models)
        router.get("/v1/models/{model}")(self.get_model)
        router.get("/health")(self.health)
        router.get("/ready")(self.ready)
        router.get("/metrics")(self.metrics)
        return router

    # -- routes -------------------------------------------------------------------

    async def chat_completions(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        body = parse_request(await request.body())
        conversation = parse_conversation(body.messages, self.config)
        version = parse_model_name(body.model, self.config.name)
        async with AsyncExitStack() as stack:
            media = await stack.enter_async_context(
                MediaResolver(self._store, owner_id(request), self._download_rules, self.config.files.allowed_dirs)
            )
            exchanges = [await resolve_tool_exchange(exchange, media) for exchange in conversation.tool_exchanges]
            agent_request = AgentRequest(
                id=request_id(request.scope),
                task=await build_task(conversation, media),
                sampling=sampling_params(body, self.config),
                max_zooms=body.vz_ray.max_zooms,
                thumbnail_size=body.vz_ray.thumbnails,
                version=version,
                replayed_zooms=tuple(exchanges),
                client_side_zooms=body.client_side_zooms,
            )
            timer = stack.enter_context(self._metrics.track_request())
            builder = CompletionBuilder(f"chatcmpl-{uuid.uuid4().hex}", self.config.name, int(time.time()))
            if not body.stream:
                return JSONResponse(await self._complete(agent_request, builder, timer))
            batches = self._event_batches(agent_request)
            stack.push_async_callback(batches.aclose)
            # A request that fails before its first event gets its own HTTP status.
            with self._api_errors(timer):
                first_batch = await anext(batches)
            if isinstance(first_batch[-1], RequestFailed):
                raise _failure_error(first_batch[-1], timer)
            # Inline media must exist until the stream ends.
            resources = stack.pop_all()
        state = StreamState(agent_request, builder, timer, include_usage=body.include_usage)
        lines = self._sse_lines(first_batch, batches, state)
        return MediaStreamingResponse(lines, resources, {"x-accel-buffering": "no"})

    async def list_models(self) -> dict[str, Any]:
        """`GET /v1/models`: the model name, with and without the current weight version."""
        state = await self._agent_state()
        versioned_name = f"{self.config.name}@{state['version']}"
        cards = [self._model_card(name, state) for name in (self.config.name, versioned_name)]
        return {"object": "list", "data": cards}

    async def get_model(self, model: str) -> dict[str, Any]:
        """`GET /v1/models/{model}`."""
        version = parse_model_name(model, self.config.name)
        state = await self._agent_state()
        if version not in (None, state["version"]):
            raise not_found(f"version {version} is not served; version {state['version']} is", "model")
        return self._model_card(model, state)

    async def health(self) -> dict[str, str]:
        """`GET /health`: liveness of this process."""
        return {"status": "ok"}

    async def ready(self) -> Response:
        """`GET /ready`: at least one agent replica is running. It may be at its maximum of requests."""
        count_replicas = asyncio.to_thread(count_running_agents, self.agent)
        try:
            count = await with_timeout(
                count_replicas,
                READY_TIMEOUT_S,
                target="Ray Serve controller",
                operation="counting agent replicas",
            )
        except StepTimeout as error:
            log.warning("%s", error)
            count = 0
        return JSONResponse({"status": "ready", "agents": count}) if count else self._not_ready().response()

    async def metrics(self) -> Response:
        """`GET /metrics`, for Prometheus."""
        return Response(self._metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # -- requests -----------------------------------------------------------------

    async def _complete(self, request: AgentRequest, builder: CompletionBuilder, timer: RequestTimer) -> dict[str, Any]:
        with self._api_errors(timer):
            *events, result = await self._call_agent(request)
        if isinstance(result, RequestFailed):
            raise _failure_error(result, timer)
        assert isinstance(result, RequestCompleted)
        self._record_completion(request, result, timer)
        return builder.completion(events, result)

    async def _call_agent(self, request: AgentRequest) -> list[AgentEvent]:
        for attempt in range(_MAX_ATTEMPTS):
            response = self.agent.answer.remote(request)
            try:
                events: list[AgentEvent] = await with_timeout(
                    response, self._request_timeout_s, target="agent", operation=f"request {request.id}"
                )
                return events
            except RayActorError:
                if attempt + 1 == _MAX_ATTEMPTS:
                    raise
                with log_context(request=request.id):
                    log.warning("Retrying request %s on another replica: its replica died", request.id)
            finally:
                response.cancel()  # no effect on a completed response
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _sse_lines(
        self, first_batch: list[AgentEvent], batches: AsyncGenerator[list[AgentEvent]], state: StreamState
    ) -> AsyncIterator[str]:
        """Yield the server-sent events of each batch. A failure ends the stream with an error event."""
        yield format_sse(state.builder.first_chunk()) + self._format_batch(first_batch, state)
        try:
            async for batch in batches:
                yield self._format_batch(batch, state)
        except Exception as error:
            api_error = self._to_api_error(error, state.timer)
            yield format_sse(api_error.body(), api_error.retry_after_s)
        yield SSE_DONE

    def _format_batch(self, batch: list[AgentEvent], state: StreamState) -> str:
        """Format a batch as server-sent events.

        Raises:
            ApiError: The batch contains a failure.
        """
        lines = []
        for event in batch:
            state.timer.observe_event(event)
            if isinstance(event, RequestFailed):
                raise _failure_error(event, state.timer)
            lines.append(format_sse(state.builder.event_chunk(event)))
            if isinstance(event, RequestCompleted):
                self._record_completion(state.request, event, state.timer)
                if state.include_usage:
                    lines.append(format_sse(state.builder.usage_chunk(event)))
        return "".join(lines)

    async def _event_batches(self, request: AgentRequest) -> AsyncGenerator[list[AgentEvent]]:
        """Stream events from a replica. Retry on another replica if the first dies before any event."""
        agent = self.agent.options(stream=True)
        end_time = time.monotonic() + self._request_timeout_s
        for attempt in range(_MAX_ATTEMPTS):
            batches, received = agent.stream.remote(request), False
            try:
                while True:
                    events: list[AgentEvent] | None = await with_timeout(
                        anext(batches, None),
                        max(0.0, end_time - time.monotonic()),
                        target="agent",
                        operation=f"request {request.id}",
                    )
                    if events is None:
                        return
                    received = True
                    yield events
            except RayActorError:
                if received or attempt + 1 == _MAX_ATTEMPTS:
                    raise
                with log_context(request=request.id):
                    log.warning("Retrying request %s on another replica: its replica died", request.id)
            finally:
                batches.cancel()

    @property
    def _request_timeout_s(self) -> float:
        return self.config.timeouts.episode_s + REQUEST_SLACK_S

    def _record_completion(self, request: AgentRequest, result: RequestCompleted, timer: RequestTimer) -> None:
        timer.outcome = result.status
        self._metrics.record_completion(result)
        texts = f": {request.task.question!r} -> {result.text!r}" if self.config.log_prompts else ""
        with log_context(request=request.id):
            log.info(
                "Completed request %s: %s after %.2f s, %d frames, %d zooms%s",
                request.id, result.status, result.seconds, result.frames, result.zooms, texts,
            )  # fmt: skip

    # -- errors -------------------------------------------------------------------

    @contextmanager
    def _api_errors(self, timer: RequestTimer) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise self._to_api_error(error, timer) from error

    def _to_api_error(self, error: Exception, timer: RequestTimer) -> ApiError:
        """Convert any exception to the error response, and record the outcome."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, ApiError):
            return cause
        timer.outcome = "error"
        if isinstance(cause, BackPressureError):
            timer.outcome = "overloaded"
            return self._queue_full()
        if isinstance(cause, RayActorError | DeploymentUnavailableError):
            message = "The agent replica died while it ran this request; retry it."
            return ApiError(503, message, code="agent_lost", retry_after_s=self.config.retry_after_s)
        if isinstance(cause, StepTimeout):
            log.warning("%s", cause)
            return ApiError(504, "The request exceeded its timeout and was cancelled.", code="timeout")
        log.error("Unhandled exception in a request", exc_info=error)
        return ApiError(500, "The request failed because of an internal error.", code="internal_error")

    def _not_ready(self) -> ApiError:
        return overloaded("No agent replica is ready yet.", self.config.retry_after_s, status=503)

    def _queue_full(self) -> ApiError:
        message = f"The queue is full ({self.config.max_queued_requests} requests); retry later."
        return overloaded(message, self.config.retry_after_s, status=503)

    # -- agents -------------------------------------------------------------------

    async def _agent_state(self) -> dict[str, Any]:
        """Return the state of one agent replica; the last known state if all queues are full."""
        try:
            self._last_agent_state = await with_timeout(
                self.agent.ready.remote(), READY_TIMEOUT_S, target="agent", operation="health query"
            )
        except BackPressureError as error:
            if not self._last_agent_state:
                raise self._queue_full() from error
        except Exception as error:
            log.info("No agent replica is ready: %s", error)
            raise self._not_ready() from error
        return self._last_agent_state

    async def _probe_video(self, path: Path | str) -> VideoInfo:
        """Return metadata of an uploaded video; raises `VideoError` if it cannot be read."""
        info: VideoInfo = await self._check_upload(self.agent.probe.remote(str(path)))
        return info

    async def _check_image(self, path: Path | str) -> None:
        """Decode an uploaded image; raises `VideoError` if it cannot be decoded."""
        await self._check_upload(self.agent.check_image.remote(str(path)))

    async def _check_upload(self, response: Any) -> Any:
        timeout_s = self.config.clips.timeout_s
        try:
            return await with_timeout(response, timeout_s, target="agent", operation="decoding an uploaded file")
        except RayTaskError as error:
            raise error.cause from None
        except BackPressureError as error:
            raise self._queue_full() from error

    def _model_card(self, name: str, state: dict[str, Any]) -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": self._created, "owned_by": "vz_ray"}
        card |= {"version": state["version"]}
        if state["swap_error"]:
            card["refused"] = state["swap_error"]
        return card


def _failure_error(failure: RequestFailed, timer: RequestTimer) -> ApiError:
    timer.outcome = "invalid"
    return ApiError(failure.http_status, failure.message, code=failure.code)


def count_running_agents(agent: DeploymentHandle) -> int:
    """Return the number of running agent replicas, from Ray Serve's controller. No replica is queried."""
    app = serve.status().applications.get(agent.app_name)
    deployment = app.deployments.get(agent.deployment_name) if app else None
    # Requests to a replica that swaps its weights wait, and are answered.
    states = (ReplicaState.RUNNING, ReplicaState.UPDATING)
    return sum(deployment.replica_states.get(state, 0) for state in states) if deployment else 0


def configure_ingress_logging(config: ServeConfig) -> str:
    """Configure the log file of this Ray Serve replica, and return the replica's id."""
    replica_id = str(serve.get_replica_context().replica_id.unique_id)
    configure_replica_logging(replica_id, RunIdentity(config.name, config.monitoring.log_format))
    return replica_id


class IngressReplica(Ingress):
    """Ingress as a Ray Serve deployment. Defined here so that its process does not import the engine."""

    def __init__(self, config: ServeConfig, agent: DeploymentHandle) -> None:
        configure_ingress_logging(config)
        super().__init__(config, agent)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.build()
