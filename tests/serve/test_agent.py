"""Agent parts without an engine: events, results, escaping, client-side zooms."""

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


def test_zoom_events_have_frames_and_reasoning():
    translator = EventTranslator(QUESTION, None)
    translator.on_env_event(events.EpisodeStarted((VIDEO,), (make_clip([0.0, 32.0]),), ()))
    translator.on_env_event(events.ZoomRequested(0, ZOOM))
    translator.on_env_event(events.TurnCompleted(0, turn(TEXT, ZOOM), make_clip([8.0, 8.5, 9.0, 9.5], ZOOM)))
    translator.on_env_event(events.TurnCompleted(1, turn("<think>so</think><answer>A</answer>")))
    overview, zooming, zoomed = translator.events
    assert [frame.pts_s for frame in overview.frames] == [0.0, 32.0]
    assert overview.frames[0].image.startswith("data:image/png;base64,")
    assert zooming == ZoomStarted(0, 0, (8.0, 10.0), 2.0)
    assert isinstance(zoomed, ZoomFinished)
    assert [frame.pts_s for frame in zoomed.frames] == [8.0, 8.5, 9.0, 9.5]
    assert (zoomed.reasoning, zoomed.seconds, zoomed.refused) == ("red", (0.5, 0.25), "")


def test_rejected_zoom_has_the_model_error():
    translator = EventTranslator(QUESTION, None)
    refused = RejectedZoom(ZoomErrorKind.OUT_OF_RANGE, "segment is outside")
    translator.on_env_event(events.TurnCompleted(0, turn(TEXT, refused)))
    (zoomed,) = translator.events
    assert (zoomed.refused, zoomed.segment, zoomed.frames) == ("segment is outside", None, ())


def test_rejected_zoom_keeps_its_segment():
    translator = EventTranslator(QUESTION, None)
    refused = RejectedZoom(ZoomErrorKind.OUT_OF_RANGE, "segment is outside", ZoomRequest(60.0, 90.0, 1.0, video=1))
    translator.on_env_event(events.TurnCompleted(0, turn(TEXT, refused)))
    (zoomed,) = translator.events
    assert (zoomed.refused, zoomed.frames) == ("segment is outside", ())
    assert (zoomed.video, zoomed.segment, zoomed.fps) == (1, (60.0, 90.0), 1.0)


def test_reasoning_that_the_prompt_opened_is_streamed_as_reasoning():
    """The streamed text of a turn starts inside `<think>`, the text of the completed turn with it."""
    emitted = []
    translator = EventTranslator(QUESTION, emitted.append, opens_reasoning=True)
    for answer in ("A", "B"):
        translator.on_text("not <answer>C")
        translator.on_text(f"not <answer>C</answer></think><answer>{answer}</answer>")
        text = f"<think>\nnot <answer>C</answer></think><answer>{answer}</answer>"
        translator.on_env_event(events.TurnCompleted(0, turn(text)))
    deltas = [event for event in emitted if isinstance(event, TextDelta)]
    assert "".join(delta.text for delta in deltas if delta.is_answer) == "AB"
    assert "".join(delta.text for delta in deltas if not delta.is_answer) == "not <answer>C</answer>" * 2


def test_text_deltas_are_not_repeated_across_turns():
    emitted = []
    translator = EventTranslator(QUESTION, emitted.append)
    translator.on_text("<think>re")
    translator.on_text("<think>red</think><video")
    translator.on_text(TEXT)
    translator.on_env_event(events.ZoomRequested(0, ZOOM))
    translator.on_env_event(events.TurnCompleted(0, turn(TEXT, ZOOM), make_clip([8.0], ZOOM)))
    translator.on_text("<think>so</think><answer>A")
    translator.on_text("<think>so</think><answer>AB</answer>")
    translator.on_env_event(events.TurnCompleted(1, turn("<think>so</think><answer>AB</answer>")))
    deltas = [event for event in emitted if isinstance(event, TextDelta)]
    assert [(delta.turn, delta.text, delta.is_answer) for delta in deltas] == [
        (0, "re", False),
        (0, "d", False),
        (1, "so", False),
        (1, "A", True),
        (1, "B", True),
    ]


def test_queued_text_deltas_are_coalesced():
    batch = coalesce([TextDelta(0, "a", False)], TextDelta(0, "b", False))
    assert batch == [TextDelta(0, "ab", False)]
    assert coalesce(batch, TextDelta(0, "c", True)) == [TextDelta(0, "ab", False), TextDelta(0, "c", True)]
    assert coalesce([ZoomStarted(0, 0, (1, 2), 1)], TextDelta(1, "c", False))[1] == TextDelta(1, "c", False)


def test_special_tokens_are_escaped():
    special = ["<|im_end|>", "<|im_start|>"]
    task = Task("", "v", "a<|im_end|>b", "", chat_history=ChatHistory("<|im_start|>", (("q<|im_end|>", "a"),)))
    exchange = ReplayedZoom('{"a": "<|im_end|>"}', "x<|im_start|>")
    clean = escape_special_tokens(AgentRequest("q", task, SamplingParams(), replayed_zooms=(exchange,)), special)
    assert clean.task.question == "a< |im_end|>b"
    assert clean.task.chat_history == ChatHistory("< |im_start|>", (("q< |im_end|>", "a"),))
    assert clean.replayed_zooms[0].text == '<think>x< |im_start|></think><video_zoom>{"a": "< |im_end|>"}</video_zoom>'
    assert escape_special_tokens(clean, special) == clean


async def test_client_frames_match_their_zoom(chat_format):  # noqa: F811
    """A rejected call uses no frames, so the frames of the next call stay aligned."""
    exchanges = (ReplayedZoom("no call"), ReplayedZoom("{}", images=("p.png",), times_s=(1.5,)))
    replayed = ReplayPolicy(SilentPolicy(), chat_format, exchanges)
    frames = ClientFrameSource(FakeFrameSource(), replayed, ["v.mp4"], stop_at_new_zoom=True)
    for _ in exchanges:  # the first call is rejected and requests no clip
        await replayed.generate(Prompt((), (), ()), SamplingParams(), request_id="r")
    assert [frame.pts_s for frame in (await frames.clip("v.mp4", ZOOM, FrameSize(25_088, 100_352, 28))).frames] == [1.5]
    await replayed.generate(Prompt((), (), ()), SamplingParams(), request_id="r")
    with pytest.raises(ClientZoomRequired):
        await frames.clip("v.mp4", ZOOM, FrameSize(25_088, 100_352, 28))


class SilentPolicy:
    async def generate(self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str) -> ExternalAction:
        return ExternalAction("", ())


class FakeFrameSource:
    async def clip(self, uri, request, size):
        return make_clip([0.0])


def test_zoom_limit_never_exceeds_agent_limit():
    config = EpisodeConfig(max_rounds=5)
    assert limit_zooms(config, None) is config
    assert limit_zooms(config, 9) is config
    assert limit_zooms(config, 2).max_rounds == 3
    assert limit_zooms(config, 0).max_rounds == 1


def played(status: EpisodeStatus, *turns: Turn, answer: str | None = None, **more) -> Trajectory:
    return Trajectory(EpisodeId(0, "q", 0), "w", TokenContext((1, 2)), turns, status, answer, **more)


def test_episode_result_of_answered_episodes():
    result = episode_result(played(EpisodeStatus.ANSWERED, turn("<think>so</think><answer>A</answer>"), answer="A"), 3)
    assert isinstance(result, RequestCompleted)
    assert (result.text, result.reasoning, result.version) == ("A", "so", 3)
    assert (result.prompt_tokens, result.completion_tokens) == (2, 3)
    without = episode_result(played(EpisodeStatus.NO_ANSWER, turn("only words")), 3)
    assert (without.text, without.status) == ("only words", "no_answer")
    gated = {"gate": {"zoom": False}}
    assert episode_result(played(EpisodeStatus.ANSWERED, turn("x"), answer="A", extra=gated), 3).gated


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("<think>so</think>\n\nonly words", "only words", "so"),
        ("<think>so <answer>A</answer>", "", "so <answer>A</answer>"),
        ("<think>so</think><video_zoom>{}</video_zoom>", "", "so"),
    ],
)
def test_text_without_an_answer_excludes_reasoning(text, content, reasoning):
    result = episode_result(played(EpisodeStatus.NO_ANSWER, turn(text)), 3)
    assert isinstance(result, RequestCompleted)
    assert (result.text, result.reasoning) == (content, reasoning)


def test_failure_hides_paths():
    extra = {"model_message": "the video is missing"}
    failed = episode_result(played(EpisodeStatus.FAILED, error="/srv/v.mp4: no such file", extra=extra), 3)
    assert failed == RequestFailed("the video is missing", "invalid_media")


def test_too_long_question_is_a_client_error():
    failed = episode_result(played(EpisodeStatus.TRUNCATED), 3)
    assert isinstance(failed, RequestFailed)
    assert failed.code == "context_length_exceeded"


def test_engine_policy_supports_draft_answers():
    class Engine:
        async def draft_answer(self) -> None: ...

    assert isinstance(EnginePolicy(Engine(), 10), DraftingPolicy)
