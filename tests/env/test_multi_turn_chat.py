"""Episodes with several or no videos, chat history and events, on real files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.episode_record import EpisodeRecord, record_from_dict, record_to_dict
from vz_ray.env.chat_format import PromptTemplate
from vz_ray.env.episode_runner import run_episode
from vz_ray.env.events import EpisodeStarted, TurnCompleted, ZoomRequested
from vz_ray.env.protocols import Prompt
from vz_ray.env.task import ChatHistory, Task
from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    ExternalAction,
    RejectedZoom,
    SamplingParams,
    ZoomErrorKind,
)
from vz_ray.env.zoom_call import parse_turn
from vz_ray.video.frame import ZoomRequest
from vz_ray.video.local_source import LocalFrameSource

CONFIG = EpisodeConfig(overview_frames=4, min_pixels=784, max_pixels=784, max_rounds=4)
ANSWER = "<think>x</think><answer>A</answer>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def call(**keys: object) -> str:
    return f"<think>x</think><video_zoom>{json.dumps(keys)}</video_zoom>"


class ScriptedTurnsPolicy:
    """Return scripted turns. Record the messages of the last prompt."""

    def __init__(self, chat_format, *turns: str) -> None:
        self.chat_format, self.turns, self.messages = chat_format, list(turns), []

    async def generate(self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str) -> ExternalAction:
        self.messages = [(message.role, message.text, len(message.frames)) for message in prompt.messages]
        text = self.turns.pop(0)
        return ExternalAction(text, self.chat_format.encode_assistant(text))


@pytest.fixture
def videos(tmp_path: Path) -> tuple[str, str]:
    """Create videos of 12 and 4 seconds."""
    return str(write_video(tmp_path, VideoSpec("a.mp4", frames=300))), str(
        write_video(tmp_path, VideoSpec("b.mp4", frames=100))
    )


async def run(task: Task, policy: ScriptedTurnsPolicy, chat_format, config: EpisodeConfig = CONFIG):
    events = []
    with LocalFrameSource() as frames:
        id = EpisodeId(0, task.task_id, 0)
        trajectory = await run_episode(
            task,
            policy,
            frames,
            chat_format,
            config,
            episode_id=id,
            sampling_params=SamplingParams(),
            on_event=events.append,
        )
    return trajectory, events


async def test_zoom_call_selects_one_of_several_videos(videos, chat_format):
    task = Task("t", videos[0], "Which?", "A", extra_videos=videos[1:])
    policy = ScriptedTurnsPolicy(chat_format, call(video=2, segment=[1, 3], fps=2), call(segment=[1, 3], fps=2), ANSWER)
    trajectory, events = await run(task, policy, chat_format)
    assert trajectory.status is EpisodeStatus.ANSWERED
    assert trajectory.zooms == (ZoomRequest(1, 3, 2, video=1),)
    assert [ref.uri for ref in trajectory.prompt.frame_refs] == [videos[0]] * 2 + [videos[1]] * 2
    assert {ref.uri for ref in trajectory.turns[0].observation.frame_refs} == {videos[1]}
    rejected = trajectory.turns[1].zoom
    assert isinstance(rejected, RejectedZoom)
    assert rejected.kind is ZoomErrorKind.WRONG_KEYS
    assert "2 videos" in rejected.message
    opening, observation = policy.messages[1], policy.messages[3]
    assert opening[1].startswith(f"\nVideo 1:\n{IMAGE}0.00{IMAGE}6.00\nVideo 2:\n{IMAGE}0.00{IMAGE}2.00")
    assert '{"video": i, "segment"' in opening[1]
    assert "Video 2:" in observation[1]
    assert [type(event) for event in events] == [
        EpisodeStarted,
        ZoomRequested,
        TurnCompleted,
        TurnCompleted,
        TurnCompleted,
    ]
    assert [video.uri for video in events[0].videos] == list(videos)
    assert events[2].clip.request.video == 1
    assert events[3].clip is None
    record = EpisodeRecord(task, trajectory)
    assert record_from_dict(json.loads(json.dumps(record_to_dict(record)))) == record


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ('{"video": 0, "segment": [1, 3], "fps": 2}', ZoomErrorKind.OUT_OF_RANGE),
        ('{"video": 3, "segment": [1, 3], "fps": 2}', ZoomErrorKind.OUT_OF_RANGE),
        ('{"video": "2", "segment": [1, 3], "fps": 2}', ZoomErrorKind.NOT_NUMBERS),
        ('{"video": 1.0, "segment": [1, 3], "fps": 2}', ZoomErrorKind.NOT_NUMBERS),
        ('{"video": true, "segment": [1, 3], "fps": 2}', ZoomErrorKind.NOT_NUMBERS),
        ('{"segment": [1, 3], "fps": 2}', ZoomErrorKind.WRONG_KEYS),
        (
            '{"video": 2, "segment": [5, 9], "fps": 2}',
            ZoomErrorKind.OUT_OF_RANGE,
        ),  # the second video has 4 seconds
    ],
)
def test_invalid_video_number_is_rejected(body, kind):
    parsed = parse_turn(f"<video_zoom>{body}</video_zoom>", duration_s=12, extra_durations_s=(4,), max_frames=16)
    assert isinstance(parsed.zoom, RejectedZoom)
    assert parsed.zoom.kind is kind


def test_video_number_is_rejected_with_one_video():
    parsed = parse_turn(
        '<video_zoom>{"video": 1, "segment": [1, 3], "fps": 2}</video_zoom>', duration_s=12, max_frames=16
    )
    assert isinstance(parsed.zoom, RejectedZoom)
    assert parsed.zoom.kind is ZoomErrorKind.WRONG_KEYS


async def test_zoom_is_rejected_without_video(chat_format):
    policy = ScriptedTurnsPolicy(chat_format, call(segment=[0, 1], fps=2), ANSWER)
    trajectory, events = await run(Task("t", "", "How are you?", ""), policy, chat_format)
    assert trajectory.status is EpisodeStatus.ANSWERED
    assert trajectory.frame_refs == ()
    assert "there is no video" in trajectory.turns[0].zoom.message
    assert events[0] == EpisodeStarted((), (), ())
    assert policy.messages[1] == ("user", "\nHow are you?", 0)


async def test_chat_history_precedes_the_question(videos, chat_format):
    chat = ChatHistory(system="Be brief.", turns=(("What is it?", "a disc"), ("Sure?", "yes")))
    task = Task("t", videos[0], "Which colour?", "A", chat_history=chat)
    policy = ScriptedTurnsPolicy(chat_format, ANSWER)
    trajectory, _ = await run(task, policy, chat_format)
    assert [(role, frames) for role, _, frames in policy.messages] == [
        ("system", 0),
        ("user", 4),
        ("assistant", 0),
        ("user", 0),
        ("assistant", 0),
        ("user", 0),
    ]
    assert policy.messages[0][1].endswith("\nBe brief.")
    assert policy.messages[1][1].endswith("What is it?")
    assert [text for _, text, _ in policy.messages[2:]] == [
        "<answer>a disc</answer>",
        "Sure?",
        "<answer>yes</answer>",
        "Which colour?",
    ]
    prompt = chat_format.tokenizer.decode(list(trajectory.prompt.compact_ids))
    assert prompt.index("a disc") < prompt.index("Sure?") < prompt.index("Which colour?")


def test_default_multi_video_texts_do_not_change_the_name(chat_format):
    template = chat_format.template
    assert template.fingerprint_items == replace(template).fingerprint_items
    assert ("video", "{number}: ") in replace(template, video="{number}: ").fingerprint_items
    assert not {"video", "several"} & {key for key, _ in PromptTemplate.load("conf/prompt/zoom.yaml").fingerprint_items}
