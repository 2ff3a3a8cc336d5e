"""What an agent makes of a question and of what happens, without an engine."""

from __future__ import annotations

import pytest

from tests.episode.conftest import make_clip, tokenizer, wire  # noqa: F401
from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.task import Chat, Task
from vz_ray.episode import events
from vz_ray.episode.gate import Drafter
from vz_ray.episode.protocols import Prompt
from vz_ray.episode.trajectory import (
    Context,
    EpisodeId,
    Sampling,
    Status,
    Trajectory,
    Turn,
    Written,
    ZoomFault,
    ZoomRefused,
)
from vz_ray.serve.agent import Speaker, plain, rules
from vz_ray.serve.asking import Answered, Failed, Question, Said, Zoomed, Zooming
from vz_ray.serve.client_tools import ClientFrames, Exchange, Replayed, ZoomForClient
from vz_ray.serve.telling import Telling, ending, joined
from vz_ray.video.frame import FrameSize, VideoInfo, Zoom

QUESTION = Question("q", Task("", "v.mp4", "What?", ""), Sampling(), thumbnails=28)
VIDEO = VideoInfo("blake3:0", "v.mp4", 0, 64.0, 8.0, 112, 112)
ZOOM = Zoom(8.0, 10.0, 2.0)
TEXT = '<think>red</think><video_zoom>{"segment": [8, 10], "fps": 2}</video_zoom>'


def turn(text: str, zoom=None) -> Turn:
    return Turn(Written(text, (1, 2, 3)), text, zoom, None, (0.5, 0.25))


def test_zooms_are_told_with_what_was_shown_and_thought():
    told = Telling(QUESTION, None)
    told.happened(events.Begun((VIDEO,), (make_clip([0.0, 32.0]),), ()))
    told.happened(events.Asked(0, ZOOM))
    told.happened(events.Ended(0, turn(TEXT, ZOOM), make_clip([8.0, 8.5, 9.0, 9.5], ZOOM)))
    told.happened(events.Ended(1, turn("<think>so</think><answer>A</answer>")))
    overview, zooming, zoomed = told.events
    assert [shown.pts_s for shown in overview.frames] == [0.0, 32.0]
    assert overview.frames[0].image.startswith("data:image/png;base64,")
    assert zooming == Zooming(0, 0, (8.0, 10.0), 2.0)
    assert isinstance(zoomed, Zoomed)
    assert [shown.pts_s for shown in zoomed.frames] == [8.0, 8.5, 9.0, 9.5]
    assert (zoomed.reasoning, zoomed.seconds, zoomed.refused) == ("red", (0.5, 0.25), "")


def test_a_refusal_is_told_in_the_models_words():
    told = Telling(QUESTION, None)
    refused = ZoomRefused(ZoomFault.OUTSIDE, "segment is outside")
    told.happened(events.Ended(0, turn(TEXT, refused)))
    (zoomed,) = told.events
    assert (zoomed.refused, zoomed.segment, zoomed.frames) == ("segment is outside", None, ())


def test_a_refusal_of_a_call_that_could_be_read_says_where_it_asked_to_look():
    told = Telling(QUESTION, None)
    refused = ZoomRefused(ZoomFault.OUTSIDE, "segment is outside", Zoom(60.0, 90.0, 1.0, video=1))
    told.happened(events.Ended(0, turn(TEXT, refused)))
    (zoomed,) = told.events
    assert (zoomed.refused, zoomed.frames) == ("segment is outside", ())
    assert (zoomed.video, zoomed.segment, zoomed.fps) == (1, (60.0, 90.0), 1.0)


def test_text_of_one_turn_is_not_told_again_with_the_next():
    heard = []
    told = Telling(QUESTION, heard.append)
    told.spoken("<think>re")
    told.spoken("<think>red</think><video")
    told.spoken(TEXT)
    told.happened(events.Asked(0, ZOOM))
    told.happened(events.Ended(0, turn(TEXT, ZOOM), make_clip([8.0], ZOOM)))
    told.spoken("<think>so</think><answer>A")
    told.spoken("<think>so</think><answer>AB</answer>")
    told.happened(events.Ended(1, turn("<think>so</think><answer>AB</answer>")))
    said = [event for event in heard if isinstance(event, Said)]
    assert [(one.turn, one.text, one.answer) for one in said] == [
        (0, "re", False),
        (0, "d", False),
        (1, "so", False),
        (1, "A", True),
        (1, "B", True),
    ]


def test_text_that_waits_is_told_together():
    batch = joined([Said(0, "a", False)], Said(0, "b", False))
    assert batch == [Said(0, "ab", False)]
    assert joined(batch, Said(0, "c", True)) == [Said(0, "ab", False), Said(0, "c", True)]
    assert joined([Zooming(0, 0, (1, 2), 1)], Said(1, "c", False))[1] == Said(1, "c", False)


def test_special_tokens_of_a_text_are_broken_up_and_nothing_else():
    special = ["<|im_end|>", "<|im_start|>"]
    task = Task("", "v", "a<|im_end|>b", "", chat=Chat("<|im_start|>", (("q<|im_end|>", "a"),)))
    exchange = Exchange('{"a": "<|im_end|>"}', "x<|im_start|>")
    clean = plain(Question("q", task, Sampling(), exchanges=(exchange,)), special)
    assert clean.task.question == "a< |im_end|>b"
    assert clean.task.chat == Chat("< |im_start|>", (("q< |im_end|>", "a"),))
    assert (
        clean.exchanges[0].text
        == '<think>x< |im_start|></think><video_zoom>{"a": "< |im_end|>"}</video_zoom>'
    )
    assert plain(clean, special) == clean


async def test_frames_of_a_client_belong_to_the_zoom_that_they_are_for(wire):  # noqa: F811
    """A call of the client's that is refused shows nothing, and does not move the frames of the next."""
    exchanges = (Exchange("no call"), Exchange("{}", pictures=("p.png",), times_s=(1.5,)))
    replayed = Replayed(Engineless(), wire, exchanges)
    frames = ClientFrames(Pictures(), replayed, ["v.mp4"], stop=True)
    for _ in exchanges:  # the first is refused: no clip is asked for
        await replayed.act(Prompt((), (), ()), Sampling(), request="r")
    assert [frame.pts_s for frame in (await frames.zoom("v.mp4", ZOOM, FrameSize())).frames] == [1.5]
    await replayed.act(Prompt((), (), ()), Sampling(), request="r")
    with pytest.raises(ZoomForClient):
        await frames.zoom("v.mp4", ZOOM, FrameSize())


class Engineless:
    async def act(self, prompt: Prompt, sampling: Sampling, *, request: str) -> Written:
        return Written("", ())


class Pictures:
    async def overview(self, uri, request, size):
        return make_clip([0.0])


def test_fewer_zooms_are_taken_than_asked_for_and_never_more():
    config = EpisodeConfig(max_rounds=5)
    assert rules(config, None) is config
    assert rules(config, 9) is config
    assert rules(config, 2).max_rounds == 3
    assert rules(config, 0).max_rounds == 1


def played(status: Status, *turns: Turn, answer: str | None = None, **more) -> Trajectory:
    return Trajectory(EpisodeId(0, "q", 0), "w", Context((1, 2)), turns, status, answer, **more)


def test_how_an_episode_ended_is_told():
    end = ending(played(Status.ANSWERED, turn("<think>so</think><answer>A</answer>"), answer="A"), 3)
    assert isinstance(end, Answered)
    assert (end.text, end.reasoning, end.version) == ("A", "so", 3)
    assert (end.prompt_tokens, end.sampled_tokens) == (2, 3)
    without = ending(played(Status.NO_ANSWER, turn("only words")), 3)
    assert (without.text, without.status) == ("only words", "no_answer")
    gated = {"gate": {"zoom": False}}
    assert ending(played(Status.ANSWERED, turn("x"), answer="A", extra=gated), 3).gated


def test_a_failure_names_no_path():
    extra = {"in_short": "the video is missing"}
    failed = ending(played(Status.FAILED, error="/srv/v.mp4: no such file", extra=extra), 3)
    assert failed == Failed("the video is missing", "invalid_media")


def test_a_question_longer_than_the_context_is_the_clients_mistake():
    failed = ending(played(Status.TRUNCATED), 3)
    assert isinstance(failed, Failed)
    assert failed.code == "context_length_exceeded"


def test_a_speaker_can_draft_for_the_zoom_gate():
    class Engine:
        async def draft(self) -> None: ...

    assert isinstance(Speaker(Engine(), 10), Drafter)
