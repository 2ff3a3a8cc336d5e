"""Episode runner with subtitles and a question image, on real files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.eval.benchmarks.factories import png
from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.episode_record import task_from_dict, task_to_dict
from vz_ray.env.episode_runner import run_episode
from vz_ray.env.protocols import Prompt
from vz_ray.env.task import SubtitleFile, Task
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, ExternalAction, SamplingParams
from vz_ray.eval.benchmarks.media_files import image_to_video
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
