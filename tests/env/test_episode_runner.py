"""Episode runner with subtitles and a question image, on real files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.eval.benchmarks.factories import png
from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.episode_record import task_from_dict, task_to_dict
from vz_ray.env.episode_runner import run_episode
from vz_ray.env.protocols import Prompt
from vz_ray.env.task import SubtitleFile, Task
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, ExternalAction, SamplingParams, Trajectory, Turn
from vz_ray.eval.benchmarks.media_files import image_to_video
from vz_ray.rollout.turn_log import TurnLog
from vz_ray.video.local_source import LocalFrameSource

SRT = "1\n00:00:03,000 --> 00:00:05,000\nhello\n\n2\n00:00:08,500 --> 00:00:09,500\nbye\n"


class ZoomOncePolicy:
    """Zoom once, then answer. Record the messages of the last prompt."""

    def __init__(self, chat_format) -> None:
        self.chat_format, self.texts = chat_format, []

    async def generate(self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str) -> ExternalAction:
        self.texts = [message.text for message in prompt.messages]
        turns = sum(message.role == "assistant" for message in prompt.messages)
        text = '<think>x</think><video_zoom>{"segment": [8, 10], "fps": 2}</video_zoom>'
        text = "<think>x</think><answer>A</answer>" if turns else text
        return ExternalAction(text, self.chat_format.encode_assistant(text))


@pytest.fixture
def task(tmp_path: Path) -> Task:
    video = write_video(tmp_path, VideoSpec("v.mp4", frames=300))  # twelve seconds
    (tmp_path / "v.srt").write_text(SRT)
    image = image_to_video(png(56, 56), tmp_path, "here")
    return Task(
        "t",
        str(video),
        "What is said?",
        "A",
        subtitles=SubtitleFile(str(tmp_path / "v.srt")),
        images=(image,),
    )


CONFIG = EpisodeConfig(overview_frames=4, min_pixels=784, max_pixels=784, max_rounds=3)


async def test_subtitles_and_question_images_are_in_the_prompt(task, chat_format):
    with LocalFrameSource() as frames:
        policy = ZoomOncePolicy(chat_format)
        id = EpisodeId(0, "t", 0)
        trajectory = await run_episode(
            task, policy, frames, chat_format, CONFIG, episode_id=id, sampling_params=SamplingParams()
        )
        resolved = await frames.resolve(list(trajectory.frame_refs))
    assert trajectory.status is EpisodeStatus.ANSWERED
    overview, zoomed = policy.texts[1], policy.texts[3]
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    # The frames are at 0, 3, 6 and 9 seconds. The image has no time.
    assert overview == (f"{image}0.00{image}3.00\nhello\n{image}6.00{image}9.00\nbye\n{image}\nWhat is said?")
    assert "9.00\nbye\n" in zoomed
    assert zoomed.count("bye") == 1
    assert "hello" not in zoomed
    assert [ref.uri for ref in trajectory.prompt.frame_refs] == [task.video] * 4 + list(task.images)
    assert [frame.ref for frame in resolved] == list(trajectory.frame_refs)


async def test_unreadable_subtitles_fail_the_episode(task, chat_format):
    Path(task.subtitles.path).unlink()
    with LocalFrameSource() as frames:
        id = EpisodeId(0, "t", 0)
        trajectory = await run_episode(
            task,
            ZoomOncePolicy(chat_format),
            frames,
            chat_format,
            CONFIG,
            episode_id=id,
            sampling_params=SamplingParams(),
        )
    assert trajectory.status is EpisodeStatus.FAILED
    assert "v.srt" in trajectory.error


def test_task_round_trip(task):
    assert task_from_dict(task_to_dict(task)) == task
    legacy = {key: value for key, value in task_to_dict(task).items() if key not in ("subtitles", "images")}
    assert task_from_dict(legacy) == Task("t", task.video, task.question, "A")


class ZoomsPolicy:
    """Zoom to later and later seconds until the last round, then answer. Fail before turn `first_turn`."""

    def __init__(self, chat_format, first_turn: int = 0) -> None:
        self.chat_format, self.first_turn, self.prompts = chat_format, first_turn, []

    async def generate(self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str) -> ExternalAction:
        turn = sum(message.role == "assistant" for message in prompt.messages)
        assert turn >= self.first_turn, "a completed turn was sampled again"
        self.prompts.append(prompt)
        start = 40 if turn == 1 else 2 * turn  # the second zoom is outside of the video
        text = f'<think>x</think><video_zoom>{{"segment": [{start}, {start + 1}], "fps": 2}}</video_zoom>'
        return ExternalAction(text, self.chat_format.encode_assistant(text if turn < 3 else "<answer>A</answer>"))


@pytest.mark.parametrize("num_completed", [1, 2, 3])
async def test_episode_continues_after_the_completed_turns(task, chat_format, num_completed):
    config, id = replace(CONFIG, max_rounds=4), EpisodeId(0, "t", 0)

    async def run(policy: ZoomsPolicy, turns: tuple[Turn, ...] = ()) -> Trajectory:
        return await run_episode(
            task,
            policy,
            frames,
            chat_format,
            config,
            episode_id=id,
            sampling_params=SamplingParams(),
            on_event=log.recorder(id),
            completed_turns=turns,
        )

    with LocalFrameSource() as frames:
        log, whole_policy = TurnLog(), ZoomsPolicy(chat_format)
        whole = await run(whole_policy)
        assert [turn.observation is None for turn in whole.turns] == [False, False, False, True]
        assert TurnLog.decode(log.take_changed()[id]) == whole.turns[:3]
        assert log.take_changed() == {}

        policy = ZoomsPolicy(chat_format, num_completed)
        continued = await run(policy, whole.turns[:num_completed])
        assert policy.prompts == whole_policy.prompts[num_completed:]
        assert continued.extra["resumed_turns"] == num_completed
        assert (continued.prompt, continued.status, continued.answer) == (whole.prompt, whole.status, whole.answer)
        assert [(t.action, t.zoom, t.observation) for t in continued.turns] == [
            (t.action, t.zoom, t.observation) for t in whole.turns
        ]
        assert TurnLog.decode(log.take_changed()[id]) == continued.turns[:3]

        first = whole.turns[0]
        assert first.observation is not None
        ref = replace(first.observation.frame_refs[0], digest="of other pixels")
        changed = replace(first.observation, frame_refs=(ref, *first.observation.frame_refs[1:]))
        started_over = await run(ZoomsPolicy(chat_format), (replace(first, observation=changed),))
        assert "resumed_turns" not in started_over.extra
        assert len(started_over.turns) == 4
        log.discard(id)
        assert log.take_changed() == {}
