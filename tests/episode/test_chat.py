"""Several videos, none at all, what was said before, and what whoever watches is told; on real files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.video.making import Made, make
from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.record import EpisodeRecord, record_from_dict, record_to_dict
from vz_ray.data.task import Chat, Task
from vz_ray.episode.events import Asked, Begun, Ended
from vz_ray.episode.protocols import Prompt
from vz_ray.episode.runner import play
from vz_ray.episode.trajectory import EpisodeId, Sampling, Status, Written, ZoomFault, ZoomRefused
from vz_ray.episode.wire import Wording
from vz_ray.episode.zoom_call import read_turn
from vz_ray.video.frame import Zoom
from vz_ray.video.local import LocalFrames

CONFIG = EpisodeConfig(overview_frames=4, min_pixels=784, max_pixels=784, max_rounds=4)
ANSWER = "<think>x</think><answer>A</answer>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def call(**keys: object) -> str:
    return f"<think>x</think><video_zoom>{json.dumps(keys)}</video_zoom>"


class Speaker:
    """Says one thing after another; keeps what it was shown."""

    def __init__(self, wire, *said: str) -> None:
        self.wire, self.said, self.seen = wire, list(said), []

    async def act(self, prompt: Prompt, sampling: Sampling, *, request: str) -> Written:
        self.seen = [(message.role, message.text, len(message.frames)) for message in prompt.messages]
        text = self.said.pop(0)
        return Written(text, self.wire.written(text))


@pytest.fixture
def videos(tmp_path: Path) -> tuple[str, str]:
    """Twelve seconds and four."""
    return str(make(tmp_path, Made("a.mp4", frames=300))), str(make(tmp_path, Made("b.mp4", frames=100)))


async def played(task: Task, policy: Speaker, wire, config: EpisodeConfig = CONFIG):
    events = []
    with LocalFrames() as frames:
        id = EpisodeId(0, task.task_id, 0)
        found = await play(
            task, policy, frames, wire, config, id=id, sampling=Sampling(), watcher=events.append
        )
    return found, events


async def test_a_zoom_says_which_of_several_videos_it_means(videos, wire):
    task = Task("t", videos[0], "Which?", "A", more_videos=videos[1:])
    speaker = Speaker(wire, call(video=2, segment=[1, 3], fps=2), call(segment=[1, 3], fps=2), ANSWER)
    trajectory, events = await played(task, speaker, wire)
    assert trajectory.status is Status.ANSWERED
    assert trajectory.zooms == (Zoom(1, 3, 2, video=1),)
    assert [ref.uri for ref in trajectory.prompt.refs] == [videos[0]] * 2 + [videos[1]] * 2
    assert {ref.uri for ref in trajectory.turns[0].reply.refs} == {videos[1]}
    refused = trajectory.turns[1].zoom
    assert isinstance(refused, ZoomRefused)
    assert refused.fault is ZoomFault.WRONG_KEYS
    assert "2 videos" in refused.message
    opening, reply = speaker.seen[1], speaker.seen[3]
    assert opening[1].startswith(f"\nVideo 1:\n{IMAGE}0.00{IMAGE}6.00\nVideo 2:\n{IMAGE}0.00{IMAGE}2.00")
    assert '{"video": i, "segment"' in opening[1]
    assert "Video 2:" in reply[1]
    assert [type(event) for event in events] == [Begun, Asked, Ended, Ended, Ended]
    assert [video.uri for video in events[0].videos] == list(videos)
    assert events[2].clip.request.video == 1
    assert events[3].clip is None
    record = EpisodeRecord(task, trajectory)
    assert record_from_dict(json.loads(json.dumps(record_to_dict(record)))) == record


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('{"video": 0, "segment": [1, 3], "fps": 2}', ZoomFault.OUTSIDE),
        ('{"video": 3, "segment": [1, 3], "fps": 2}', ZoomFault.OUTSIDE),
        ('{"video": "2", "segment": [1, 3], "fps": 2}', ZoomFault.NOT_NUMBERS),
        ('{"video": 1.0, "segment": [1, 3], "fps": 2}', ZoomFault.NOT_NUMBERS),
        ('{"video": true, "segment": [1, 3], "fps": 2}', ZoomFault.NOT_NUMBERS),
        ('{"segment": [1, 3], "fps": 2}', ZoomFault.WRONG_KEYS),
        ('{"video": 2, "segment": [5, 9], "fps": 2}', ZoomFault.OUTSIDE),  # that one has 4 seconds
    ],
)
def test_a_video_that_is_not_there_is_refused(body, fault):
    said = read_turn(f"<video_zoom>{body}</video_zoom>", duration_s=12, more_s=(4,), max_frames=16)
    assert isinstance(said.zoom, ZoomRefused)
    assert said.zoom.fault is fault


def test_with_one_video_a_zoom_names_none():
    said = read_turn(
        '<video_zoom>{"video": 1, "segment": [1, 3], "fps": 2}</video_zoom>', duration_s=12, max_frames=16
    )
    assert isinstance(said.zoom, ZoomRefused)
    assert said.zoom.fault is ZoomFault.WRONG_KEYS


async def test_a_chat_about_no_video_has_nothing_to_zoom_into(wire):
    speaker = Speaker(wire, call(segment=[0, 1], fps=2), ANSWER)
    trajectory, events = await played(Task("t", "", "How are you?", ""), speaker, wire)
    assert trajectory.status is Status.ANSWERED
    assert trajectory.refs == ()
    assert "there is no video" in trajectory.turns[0].zoom.message
    assert events[0] == Begun((), (), ())
    assert speaker.seen[1] == ("user", "\nHow are you?", 0)


async def test_what_was_said_before_stands_between_the_frames_and_the_question(videos, wire):
    chat = Chat(system="Be brief.", past=(("What is it?", "a disc"), ("Sure?", "yes")))
    task = Task("t", videos[0], "Which colour?", "A", chat=chat)
    speaker = Speaker(wire, ANSWER)
    trajectory, _ = await played(task, speaker, wire)
    assert [(role, frames) for role, _, frames in speaker.seen] == [
        ("system", 0),
        ("user", 4),
        ("assistant", 0),
        ("user", 0),
        ("assistant", 0),
        ("user", 0),
    ]
    assert speaker.seen[0][1].endswith("\nBe brief.")
    assert speaker.seen[1][1].endswith("What is it?")
    assert [text for _, text, _ in speaker.seen[2:]] == [
        "<answer>a disc</answer>",
        "Sure?",
        "<answer>yes</answer>",
        "Which colour?",
    ]
    prompt = wire.tokenizer.decode(list(trajectory.prompt.compact_ids))
    assert prompt.index("a disc") < prompt.index("Sure?") < prompt.index("Which colour?")


def test_wording_of_several_videos_makes_another_wire_format_only_where_a_file_says_it(wire):
    usual = wire.wording
    assert usual.told_apart_by == replace(usual).told_apart_by
    assert ("video", "{number}: ") in replace(usual, video="{number}: ").told_apart_by
    assert not {"video", "several"} & {key for key, _ in Wording.load("conf/prompt/zoom.yaml").told_apart_by}
