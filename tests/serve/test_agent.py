"""What an agent makes of a question and of what happens, without an engine."""

from __future__ import annotations

import pytest

from tests.env.conftest import chat_format, make_clip, tokenizer  # noqa: F401
from vz_ray.config.episode import EpisodeConfig
from vz_ray.env import events
from vz_ray.env.protocols import Prompt
from vz_ray.env.task import ChatHistory, Task
from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    ExternalAction,
    RejectedZoom,
    SamplingParams,
    TokenContext,
    Trajectory,
    Turn,
    ZoomErrorKind,
)
from vz_ray.env.zoom_gate import DraftingPolicy
from vz_ray.serve.agent import EnginePolicy, escape_special_tokens, limit_zooms
from vz_ray.serve.agent_protocol import (
    AgentRequest,
    RequestCompleted,
    RequestFailed,
    TextDelta,
    ZoomFinished,
    ZoomStarted,
)
from vz_ray.serve.client_zoom import ClientFrameSource, ClientZoomRequired, ReplayedZoom, ReplayPolicy
from vz_ray.serve.streaming import EventTranslator, coalesce, episode_result
from vz_ray.video.frame import FrameSize, VideoInfo, ZoomRequest

QUESTION = AgentRequest("q", Task("", "v.mp4", "What?", ""), SamplingParams(), thumbnail_size=28)
VIDEO = VideoInfo("blake3:0", "v.mp4", 0, 64.0, 8.0, 112, 112)
ZOOM = ZoomRequest(8.0, 10.0, 2.0)
TEXT = '<think>red</think><video_zoom>{"segment": [8, 10], "fps": 2}</video_zoom>'


def turn(text: str, zoom=None) -> Turn:
    return Turn(ExternalAction(text, (1, 2, 3)), text, zoom, None, (0.5, 0.25))


def test_zooms_are_told_with_what_was_shown_and_thought():
    told = EventTranslator(QUESTION, None)
    told.on_env_event(events.EpisodeStarted((VIDEO,), (make_clip([0.0, 32.0]),), ()))
    told.on_env_event(events.ZoomRequested(0, ZOOM))
    told.on_env_event(events.TurnCompleted(0, turn(TEXT, ZOOM), make_clip([8.0, 8.5, 9.0, 9.5], ZOOM)))
    told.on_env_event(events.TurnCompleted(1, turn("<think>so</think><answer>A</answer>")))
    overview, zooming, zoomed = told.events
    assert [shown.pts_s for shown in overview.frames] == [0.0, 32.0]
    assert overview.frames[0].image.startswith("data:image/png;base64,")
    assert zooming == ZoomStarted(0, 0, (8.0, 10.0), 2.0)
    assert isinstance(zoomed, ZoomFinished)
    assert [shown.pts_s for shown in zoomed.frames] == [8.0, 8.5, 9.0, 9.5]
    assert (zoomed.reasoning, zoomed.seconds, zoomed.refused) == ("red", (0.5, 0.25), "")


def test_a_refusal_is_told_in_the_models_words():
    told = EventTranslator(QUESTION, None)
    refused = RejectedZoom(ZoomErrorKind.OUT_OF_RANGE, "segment is outside")
    told.on_env_event(events.TurnCompleted(0, turn(TEXT, refused)))
    (zoomed,) = told.events
    assert (zoomed.refused, zoomed.segment, zoomed.frames) == ("segment is outside", None, ())


def test_a_refusal_of_a_call_that_could_be_read_says_where_it_asked_to_look():
    told = EventTranslator(QUESTION, None)
    refused = RejectedZoom(
        ZoomErrorKind.OUT_OF_RANGE, "segment is outside", ZoomRequest(60.0, 90.0, 1.0, video=1)
    )
    told.on_env_event(events.TurnCompleted(0, turn(TEXT, refused)))
    (zoomed,) = told.events
    assert (zoomed.refused, zoomed.frames) == ("segment is outside", ())
    assert (zoomed.video, zoomed.segment, zoomed.fps) == (1, (60.0, 90.0), 1.0)


def test_text_of_one_turn_is_not_told_again_with_the_next():
    heard = []
    told = EventTranslator(QUESTION, heard.append)
    told.on_text("<think>re")
    told.on_text("<think>red</think><video")
    told.on_text(TEXT)
    told.on_env_event(events.ZoomRequested(0, ZOOM))
    told.on_env_event(events.TurnCompleted(0, turn(TEXT, ZOOM), make_clip([8.0], ZOOM)))
    told.on_text("<think>so</think><answer>A")
    told.on_text("<think>so</think><answer>AB</answer>")
    told.on_env_event(events.TurnCompleted(1, turn("<think>so</think><answer>AB</answer>")))
    said = [event for event in heard if isinstance(event, TextDelta)]
    assert [(one.turn, one.text, one.is_answer) for one in said] == [
        (0, "re", False),
        (0, "d", False),
        (1, "so", False),
        (1, "A", True),
        (1, "B", True),
    ]


def test_text_that_waits_is_told_together():
    batch = coalesce([TextDelta(0, "a", False)], TextDelta(0, "b", False))
    assert batch == [TextDelta(0, "ab", False)]
    assert coalesce(batch, TextDelta(0, "c", True)) == [TextDelta(0, "ab", False), TextDelta(0, "c", True)]
    assert coalesce([ZoomStarted(0, 0, (1, 2), 1)], TextDelta(1, "c", False))[1] == TextDelta(1, "c", False)


def test_special_tokens_of_a_text_are_broken_up_and_nothing_else():
    special = ["<|im_end|>", "<|im_start|>"]
    task = Task(
        "", "v", "a<|im_end|>b", "", chat_history=ChatHistory("<|im_start|>", (("q<|im_end|>", "a"),))
    )
    exchange = ReplayedZoom('{"a": "<|im_end|>"}', "x<|im_start|>")
    clean = escape_special_tokens(
        AgentRequest("q", task, SamplingParams(), replayed_zooms=(exchange,)), special
    )
    assert clean.task.question == "a< |im_end|>b"
    assert clean.task.chat_history == ChatHistory("< |im_start|>", (("q< |im_end|>", "a"),))
    assert (
        clean.replayed_zooms[0].text
        == '<think>x< |im_start|></think><video_zoom>{"a": "< |im_end|>"}</video_zoom>'
    )
    assert escape_special_tokens(clean, special) == clean


async def test_frames_of_a_client_belong_to_the_zoom_that_they_are_for(chat_format):  # noqa: F811
    """A call of the client's that is refused shows nothing, and does not move the frames of the next."""
    exchanges = (ReplayedZoom("no call"), ReplayedZoom("{}", images=("p.png",), times_s=(1.5,)))
    replayed = ReplayPolicy(SilentPolicy(), chat_format, exchanges)
    frames = ClientFrameSource(FakeFrameSource(), replayed, ["v.mp4"], stop_at_new_zoom=True)
    for _ in exchanges:  # the first is refused: no clip is asked for
        await replayed.generate(Prompt((), (), ()), SamplingParams(), request_id="r")
    assert [frame.pts_s for frame in (await frames.zoom("v.mp4", ZOOM, FrameSize())).frames] == [1.5]
    await replayed.generate(Prompt((), (), ()), SamplingParams(), request_id="r")
    with pytest.raises(ClientZoomRequired):
        await frames.zoom("v.mp4", ZOOM, FrameSize())


class SilentPolicy:
    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str
    ) -> ExternalAction:
        return ExternalAction("", ())


class FakeFrameSource:
    async def overview(self, uri, request, size):
        return make_clip([0.0])


def test_fewer_zooms_are_taken_than_asked_for_and_never_more():
    config = EpisodeConfig(max_rounds=5)
    assert limit_zooms(config, None) is config
    assert limit_zooms(config, 9) is config
    assert limit_zooms(config, 2).max_rounds == 3
    assert limit_zooms(config, 0).max_rounds == 1


def played(status: EpisodeStatus, *turns: Turn, answer: str | None = None, **more) -> Trajectory:
    return Trajectory(EpisodeId(0, "q", 0), "w", TokenContext((1, 2)), turns, status, answer, **more)


def test_how_an_episode_ended_is_told():
    end = episode_result(
        played(EpisodeStatus.ANSWERED, turn("<think>so</think><answer>A</answer>"), answer="A"), 3
    )
    assert isinstance(end, RequestCompleted)
    assert (end.text, end.reasoning, end.version) == ("A", "so", 3)
    assert (end.prompt_tokens, end.completion_tokens) == (2, 3)
    without = episode_result(played(EpisodeStatus.NO_ANSWER, turn("only words")), 3)
    assert (without.text, without.status) == ("only words", "no_answer")
    gated = {"gate": {"zoom": False}}
    assert episode_result(played(EpisodeStatus.ANSWERED, turn("x"), answer="A", extra=gated), 3).gated


def test_a_failure_names_no_path():
    extra = {"model_message": "the video is missing"}
    failed = episode_result(played(EpisodeStatus.FAILED, error="/srv/v.mp4: no such file", extra=extra), 3)
    assert failed == RequestFailed("the video is missing", "invalid_media")


def test_a_question_longer_than_the_context_is_the_clients_mistake():
    failed = episode_result(played(EpisodeStatus.TRUNCATED), 3)
    assert isinstance(failed, RequestFailed)
    assert failed.code == "context_length_exceeded"


def test_a_speaker_can_draft_for_the_zoom_gate():
    class Engine:
        async def draft_answer(self) -> None: ...

    assert isinstance(EnginePolicy(Engine(), 10), DraftingPolicy)
