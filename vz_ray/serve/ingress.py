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

from vz_ray.clips.opening import remote_rules
from vz_ray.config.serve import ServeConfig
from vz_ray.data.task import AnswerType, Chat, Task
from vz_ray.episode.trajectory import Sampling
from vz_ray.observe.deadline import Overdue, within
from vz_ray.observe.logs import in_replica
from vz_ray.observe.records import Badge, about
from vz_ray.serve import replies
from vz_ray.serve.asking import Answered, Event, Failed, Question, Said
from vz_ray.serve.chat import Conversation, Zoomed, read_conversation, read_model, read_request
from vz_ray.serve.chat import Request as ChatRequest
from vz_ray.serve.client_tools import Exchange
from vz_ray.serve.errors import ApiError, not_found, overloaded, request_id, server_error
from vz_ray.serve.files import open_store
from vz_ray.serve.files import router as files_router
from vz_ray.serve.guard import owner, protect
from vz_ray.serve.keys import KeyRing
from vz_ray.serve.measures import Course, Measures
from vz_ray.serve.media import KeepingStream, Media
from vz_ray.serve.page import page_router
from vz_ray.serve.replies import Reply
from vz_ray.video.frame import VideoInfo

log = logging.getLogger(__name__)

READY_S = 10.0
"""How long an agent may take to say that it is well."""
SLACK_S = 30.0
"""How much longer than an episode a request may take: waiting for a place is not part of it."""
_ATTEMPTS = 2
"""Agents that a request is tried on; one that died took nothing with it that cannot be done again."""


@dataclass
class Told:
    """A stream under way.

    Attributes:
        usage: It is to end with token counts.
        said: Some of the answer's text has been sent.
    """

    question: Question
    reply: Reply
    course: Course
    usage: bool
    said: bool = False


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
        self._measures = Measures()
        self._state: dict[str, Any] = {}

    def build(self) -> FastAPI:
        """The application, made where it runs."""
        config = self.config
        app = FastAPI(
            title="vz_ray", docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._while_alive
        )
        keys = KeyRing.configured(config.guard.keys, config.guard.keys_env, os.environ)
        self._store = open_store(config.files, config.guard)
        self._rules = remote_rules(config.clips)
        app.include_router(self._routes())
        app.include_router(files_router(self._store, self._probe, self._look))
        app.include_router(page_router())
        protect(app, config.guard, keys)
        return app

    @asynccontextmanager
    async def _while_alive(self, _: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(self._store.keep_swept())
        yield
        sweeping.cancel()

    def _routes(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        router.add_api_route("/v1/models", self.models, methods=["GET"])
        router.add_api_route("/v1/models/{model}", self.model, methods=["GET"])
        router.add_api_route("/health", self.health, methods=["GET"])
        router.add_api_route("/ready", self.ready, methods=["GET"])
        router.add_api_route("/metrics", self.metrics, methods=["GET"])
        return router

    # -- routes -------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        asked = read_request(await request.body())
        conversation = read_conversation(asked.messages, self.config)
        version = read_model(asked.model, self.config.name)
        async with AsyncExitStack() as stack:
            whose, roots = owner(request), self.config.files.roots
            media = await stack.enter_async_context(Media(self._store, whose, self._rules, roots))
            question = Question(
                id=request_id(request.scope),
                task=await self._task(conversation, media),
                sampling=self._sampling(asked),
                max_zooms=asked.vz_ray.max_zooms,
                thumbnails=asked.vz_ray.thumbnails,
                version=version,
                exchanges=tuple([await exchange(one, media) for one in conversation.zoomed]),
                client_zooms=asked.client_zooms,
            )
            course = stack.enter_context(self._measures.course())
            reply = Reply(f"chatcmpl-{uuid.uuid4().hex}", self.config.name, int(time.time()))
            if not asked.stream:
                return JSONResponse(await self._whole(question, reply, course))
            batches = self._batches(question)
            stack.push_async_callback(batches.aclose)
            # What is refused before anything has happened is refused with a status of its own.
            first = await self._first(batches, course)
            # The media are kept until the stream ends.
            rest = stack.pop_all()
        told = Told(question, reply, course, usage=asked.wants_usage)
        lines = self._lines(first, batches, told)
        return KeepingStream(lines, rest, {"x-accel-buffering": "no"})

    async def models(self) -> dict[str, Any]:
        """`GET /v1/models`: the agent, and the weights that it answers with."""
        state = await self._agent_state()
        return {"object": "list", "data": [self._card(self.config.name, state), self._card_of(state)]}

    async def model(self, model: str) -> dict[str, Any]:
        """`GET /v1/models/{model}`."""
        version = read_model(model, self.config.name)
        state = await self._agent_state()
        if version not in (None, state["version"]):
            raise not_found(f"version {version} is not served; version {state['version']} is", "model")
        return self._card(model, state)

    async def health(self) -> dict[str, str]:
        """`GET /health`: this process runs."""
        return {"status": "ok"}

    async def ready(self) -> Response:
        """`GET /ready`: an agent runs, whether it has a place for a request at the moment or not."""
        running = asyncio.to_thread(running_agents, self.agent)
        try:
            count = await within(READY_S, running, who="Ray Serve's controller", what="its count of agents")
        except Overdue as error:
            log.warning("%s", error)
            count = 0
        return JSONResponse({"status": "ready", "agents": count}) if count else self._none_ready().response()

    async def metrics(self) -> Response:
        """`GET /metrics`, for Prometheus."""
        return Response(self._measures.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # -- parts ------------------------------------------------------------------

    async def _task(self, conversation: Conversation, media: Media) -> Task:
        videos: list[str] = []
        pictures: list[str] = []
        for one in conversation.media:
            if one.kind == "file":
                found = await media.upload(one.url, one.param)
            else:
                found = await media.resolve(one.url, one.kind, one.param)
            (videos if found.medium == "video" else pictures).append(found.uri)
        return Task(
            task_id="",
            video=videos[0] if videos else "",
            question=conversation.question,
            answer="",
            answer_type=AnswerType.MULTIPLE_CHOICE,
            pictures=tuple(pictures),
            more_videos=tuple(videos[1:]),
            chat=Chat(conversation.system, tuple(conversation.past)),
        )

    def _sampling(self, asked: ChatRequest) -> Sampling:
        config = self.config
        most = asked.max_completion_tokens or asked.max_tokens
        return Sampling(
            temperature=config.temperature if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            max_tokens=most or config.episode.max_context,
            seed=asked.seed,
        )

    async def _whole(self, question: Question, reply: Reply, course: Course) -> dict[str, Any]:
        try:
            *told, end = await self._answer(question)
        except Exception as error:
            raise self._refusal(error, course) from error
        if isinstance(end, Failed):
            course.outcome = "refused"
            raise replies.refusal(end)
        assert isinstance(end, Answered)
        self._ended(question, end, course)
        return reply.whole(told, end)

    async def _answer(self, question: Question) -> list[Event]:
        for attempt in range(_ATTEMPTS):
            answer = self.agent.answer.remote(question)
            try:
                events: list[Event] = await within(self._seconds, answer, who="the agents", what=question.id)
                return events
            except RayActorError:
                if attempt + 1 == _ATTEMPTS:
                    raise
                with about(request=question.id):
                    log.warning("request %s: its agent died; another one is asked", question.id)
            finally:
                answer.cancel()  # does nothing to one that has come
        raise AssertionError("no attempt was made")

    async def _first(self, batches: AsyncGenerator[list[Event]], course: Course) -> list[Event]:
        try:
            first = await anext(batches)
        except Exception as error:
            raise self._refusal(error, course) from error
        if isinstance(first[-1], Failed):
            course.outcome = "refused"
            raise replies.refusal(first[-1])
        return first

    async def _lines(
        self, first: list[Event], batches: AsyncGenerator[list[Event]], told: Told
    ) -> AsyncIterator[str]:
        """The stream's lines, those of a batch together; ends with an error event where it fails midway."""
        yield replies.sse(told.reply.first()) + self._told(first, told)
        try:
            async for batch in batches:
                yield self._told(batch, told)
        except Exception as error:
            refused = self._refusal(error, told.course)
            yield replies.sse(refused.body(), refused.retry_after_s)
        yield replies.DONE

    def _told(self, batch: list[Event], told: Told) -> str:
        """The lines of what happened. Raises `ApiError` where that is a failure."""
        lines = []
        for event in batch:
            told.course.happened(event)
            if isinstance(event, Failed):
                told.course.outcome = "refused"
                raise replies.refusal(event)
            if isinstance(event, Answered):
                self._ended(told.question, event, told.course)
                lines.append(replies.sse(told.reply.last(event, said=told.said)))
                lines += [replies.sse(told.reply.usage(event))] if told.usage else []
            else:
                told.said |= isinstance(event, Said) and event.answer
                lines.append(replies.sse(told.reply.chunk(event)))
        return "".join(lines)

    async def _batches(self, question: Question) -> AsyncGenerator[list[Event]]:
        """What happens, tried on another agent where one died before it had said anything."""
        agent, until = self.agent.options(stream=True), time.monotonic() + self._seconds
        for attempt in range(_ATTEMPTS):
            batches, begun = agent.stream.remote(question), False
            try:
                while True:
                    left = max(0.0, until - time.monotonic())
                    batch = anext(batches, None)
                    events: list[Event] | None = await within(left, batch, who="the agents", what=question.id)
                    if events is None:
                        return
                    begun = True
                    yield events
            except RayActorError:
                if begun or attempt + 1 == _ATTEMPTS:
                    raise
                with about(request=question.id):
                    log.warning("request %s: its agent died; another one is asked", question.id)
            finally:
                batches.cancel()

    @property
    def _seconds(self) -> float:
        """How long a request may take in all."""
        return self.config.episode_deadline_s + SLACK_S

    def _ended(self, question: Question, end: Answered, course: Course) -> None:
        course.outcome = end.status
        self._measures.answered(end)
        words = f": {question.task.question!r} -> {end.text!r}" if self.config.log_prompts else ""
        with about(request=question.id):
            log.info(
                "request %s: %s after %.2f s, %d frames, %d zooms%s",
                question.id, end.status, end.seconds, end.frames, end.zooms, words,
            )  # fmt: skip

    def _refusal(self, error: Exception, course: Course) -> ApiError:
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
        if isinstance(cause, Overdue):
            log.warning("%s", cause)
            return server_error("The request took too long, and was given up.", "timeout", 504)
        log.error("a request failed in a way that nobody foresaw", exc_info=error)
        return server_error("The server failed on this request.")

    async def _agent_state(self) -> dict[str, Any]:
        """What an agent says of itself; where all are full, what one said last."""
        try:
            self._state = await within(
                READY_S, self.agent.ready.remote(), who="the agents", what="a sign of life"
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
        await self._opened(self.agent.look.remote(str(path)))

    async def _opened(self, answer: Any) -> Any:
        seconds = self.config.clips.deadline_s
        try:
            return await within(seconds, answer, who="the agents", what="a look at an upload")
        except RayTaskError as error:
            raise error.cause from None
        except BackPressureError as error:
            raise self._busy() from error

    def _busy(self) -> ApiError:
        waiting = f"{self.config.queue} requests are waiting already; try again later."
        return overloaded(waiting, self.config.retry_after_s, status=503)

    def _card(self, id: str, state: dict[str, Any]) -> dict[str, Any]:
        card = {"id": id, "object": "model", "created": self._created, "owned_by": "vz_ray"}
        card |= {"version": state["version"]}
        if state["refused"]:
            card["refused"] = state["refused"]
        return card

    def _card_of(self, state: dict[str, Any]) -> dict[str, Any]:
        return self._card(f"{self.config.name}@{state['version']}", state)


def running_agents(agent: DeploymentHandle) -> int:
    """How many agents Ray Serve's controller has running; they are not asked, so they may be full."""
    app = serve.status().applications.get(agent.app_name)
    deployment = app.deployments.get(agent.deployment_name) if app else None
    # While one takes other weights, requests wait for it and are answered.
    states = (ReplicaState.RUNNING, ReplicaState.UPDATING)
    return sum(deployment.replica_states.get(state, 0) for state in states) if deployment else 0


async def exchange(zoomed: Zoomed, media: Media) -> Exchange:
    """A tool call and its reply, with the frames that the client shows resolved."""
    found = [await media.resolve(frame.url, "image", frame.param) for frame in zoomed.frames]
    return Exchange(
        arguments=zoomed.arguments,
        reasoning=zoomed.reasoning,
        pictures=tuple(source.uri for source in found),
        times_s=tuple(frame.pts or 0.0 for frame in zoomed.frames),
    )


def begin_log(config: ServeConfig) -> str:
    """Sends what this replica logs to its file, with the name of what is served; returns the replica's id."""
    id = str(serve.get_replica_context().replica_id.unique_id)
    in_replica(id, Badge(config.name, config.observe.log_format))
    return id


class IngressReplica(Ingress):
    """An ingress that Ray Serve starts; here, so that its process need not import what agents need."""

    def __init__(self, config: ServeConfig, agent: DeploymentHandle) -> None:
        begin_log(config)
        super().__init__(config, agent)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.build()
