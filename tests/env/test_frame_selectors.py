"""Frame selectors and the validation of their results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.frame_selector import FrameSelectorConfig
from vz_ray.env.episode_runner import run_episode
from vz_ray.env.frame_selectors import create_frame_selector, strip_options
from vz_ray.env.protocols import Prompt
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, ExternalAction, SamplingParams, Trajectory
from vz_ray.utils.errors import UserError
from vz_ray.video.frame import OverviewRequest, VideoInfo
from vz_ray.video.frame_selection import SelectionParams
from vz_ray.video.local_source import LocalFrameSource

CUSTOM = "tests.env.custom_selectors"
CONFIG = EpisodeConfig(overview_frames=4, min_pixels=784, max_pixels=784)
INFO = VideoInfo("blake3:0", "talk.mp4", 0, duration_s=12.8, fps=25.0, width=96, height=64)
QUESTION = "What flashes while the red border is shown?"
TASK = Task("needle/7", "talk.mp4", f"{QUESTION}\nA. disc\nB. ring", "A")


class AnsweringPolicy:
    def __init__(self, chat_format) -> None:
        self.chat_format = chat_format

    async def generate(self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str) -> ExternalAction:
        text = "<think>x</think><answer>A</answer>"
        return ExternalAction(text, self.chat_format.encode_assistant(text))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    """320 frames at 25 fps, a keyframe every second."""
    spec = VideoSpec("talk.mp4", gop=25, options={"sc_threshold": "0"})
    return str(write_video(tmp_path_factory.mktemp("videos"), spec))


def index(folder: Path, *records: object) -> str:
    path = folder / "TSPO_MLVU_frameIdx.json"
    path.write_text(json.dumps(list(records)))
    return str(path)


def record(frames: Sequence[object], **fields: object) -> dict[str, object]:
    defaults = {
        "video": "1_plotQA/talk.mp4",
        "duration": 12.8,
        "question": QUESTION,
        "candidates": ["disc", "ring"],
    }
    return {**defaults, "answer": "disc", "question_type": "plotQA", **fields, "frame_idx": list(frames)}


async def run_with(video: str, chat_format, selector: FrameSelectorConfig, ranker=None) -> Trajectory:
    task, config = replace(TASK, video=video), replace(CONFIG, selector=selector)
    with LocalFrameSource() as frames:
        return await run_episode(
            task,
            AnsweringPolicy(chat_format),
            frames,
            chat_format,
            config,
            episode_id=EpisodeId(0, "t", 0),
            sampling_params=SamplingParams(),
            ranker=ranker,
        )


async def selected_times(video: str, chat_format, selector: FrameSelectorConfig, ranker=None) -> list[float]:
    trajectory = await run_with(video, chat_format, selector, ranker)
    assert trajectory.status is EpisodeStatus.ANSWERED, trajectory.error
    return [ref.pts_s for ref in trajectory.prompt.frame_refs]


async def select(config: FrameSelectorConfig, task: Task = TASK, max_frames: int = 4):
    return await create_frame_selector(config).select(task, INFO, OverviewRequest(0.5, max_frames))


@pytest.mark.parametrize(
    ("selector", "times"),
    [
        (FrameSelectorConfig(), [0.0, 3.2, 6.4, 9.6]),
        (FrameSelectorConfig("count"), [0.0, 3.2, 6.4, 9.6]),
        (FrameSelectorConfig("keyframes"), [0.0, 3.0, 6.0, 10.0]),
        (FrameSelectorConfig(f"{CUSTOM}:ends"), [0.0, 12.76]),
    ],
    ids=lambda value: value.kind if isinstance(value, FrameSelectorConfig) else "",
)
async def test_episode_uses_the_selected_frames(video, chat_format, selector, times):
    assert await selected_times(video, chat_format, selector) == pytest.approx(times)


async def test_tspo_selects_the_record_of_the_question(video, chat_format, tmp_path):
    other = record([1.0, 2.0], question="What flashes while the blue border is shown?")
    elsewhere = record([3.0], video="other.mp4")
    path = index(tmp_path, other, elsewhere, record([0.0, 25.0, 25.0, 319.0]))
    assert await selected_times(video, chat_format, FrameSelectorConfig("tspo", index_file=path)) == pytest.approx(
        [0.0, 1.0, 12.76]
    )


async def test_tspo_above_frame_limit_is_subsampled(tmp_path):
    path = index(tmp_path, record([float(k) for k in range(64)]))
    selection = await select(FrameSelectorConfig("tspo", index_file=path), max_frames=4)
    assert selection.request.frame_indices == (0, 16, 32, 48)


async def test_tspo_frame_beyond_video_fails_the_episode(video, chat_format, tmp_path):
    path = index(tmp_path, record([0.0, 320.0]))
    trajectory = await run_with(video, chat_format, FrameSelectorConfig("tspo", index_file=path))
    assert trajectory.status is EpisodeStatus.FAILED
    assert "selected frame 320 does not exist" in trajectory.error


async def test_missing_tspo_record_raises_or_falls_back(tmp_path):
    path = index(tmp_path, record([0.0], question="Who sings?"))
    with pytest.raises(UserError, match=r"no record of task 'needle/7' on talk\.mp4.*on_missing=uniform"):
        await select(FrameSelectorConfig("tspo", index_file=path))
    selection = await select(FrameSelectorConfig("tspo", index_file=path, on_missing="uniform"))
    assert (selection.request, selection.used_fallback) == (OverviewRequest(0.5, 4), True)


async def test_tspo_options_or_ids_resolve_ambiguity(tmp_path):
    cross = record([1.0], candidates=["cross", "disc"], question_id="6")
    ring = record([2.0], candidates=["disc", "ring"], question_id="6")
    path = index(tmp_path, cross, ring)
    assert (await select(FrameSelectorConfig("tspo", index_file=path))).request.frame_indices == (2,)
    path = index(tmp_path / "..", *(record([float(k)], question_id=str(k)) for k in (5, 7)))
    assert (await select(FrameSelectorConfig("tspo", index_file=path))).request.frame_indices == (7,)


async def test_ambiguous_tspo_records_are_rejected(tmp_path):
    path = index(tmp_path, record([1.0]), record([2.0]))
    with pytest.raises(UserError, match="records 0 and 1 both match task 'needle/7'"):
        await select(FrameSelectorConfig("tspo", index_file=path))


async def test_tspo_videomme_record_is_found_by_video_id(tmp_path):
    row = {"video_id": "001", "videoID": "talk", "question_id": "001-1", "question": QUESTION}
    path = index(tmp_path, {**row, "options": ["A. disc", "B. ring"], "frame_idx": [4.0]})
    assert (await select(FrameSelectorConfig("tspo", index_file=path))).request.frame_indices == (4,)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([2.0, 1.0], "record 0: frame_idx holds 1.0; numbers must ascend"),
        ([-1.0], "holds -1.0"),
        (["x"], "holds 'x', which is not a frame number"),
        ([float("nan")], "holds nan"),
        ([], "must be a list of frame numbers"),
    ],
)
async def test_tspo_index_with_invalid_frames_is_rejected(tmp_path, frames, message):
    folder = tmp_path / message[:8].strip()
    folder.mkdir()
    with pytest.raises(UserError, match=message):
        await select(FrameSelectorConfig("tspo", index_file=index(folder, record(frames))))


async def test_missing_or_invalid_tspo_index_is_rejected(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the TSPO index .*none\.json"):
        await select(FrameSelectorConfig("tspo", index_file=str(tmp_path / "none.json")))
    (tmp_path / "text.json").write_text("frames")
    with pytest.raises(UserError, match="not valid JSON"):
        await select(FrameSelectorConfig("tspo", index_file=str(tmp_path / "text.json")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_many", "returned 5 frames; the maximum is 4"),
        ("unsorted", "returned 1 s after 2 s; times must ascend"),
        ("twice", "returned 1 s twice"),
        ("not_finite", "returned nan, which is not finite"),
        ("outside", r"returned 13\.8 s; the video is from 0 to 12\.8 s"),
        ("negative", "returned -1 s"),
        ("nothing", "returned no frame"),
        ("not_a_sequence", "returned None"),
        ("fails", "raised LookupError: no scenes of What flashes"),
        ("takes_two_arguments", r"cannot be called with \(video, question, max_frames\)"),
        ("absent", "has no function 'absent'; its functions are ends"),
    ],
)
async def test_function_violating_contract_is_named(name, message):
    with pytest.raises(UserError, match=message) as error:
        await select(FrameSelectorConfig(f"{CUSTOM}:{name}"))
    assert f"'{CUSTOM}:{name}'" in str(error.value)
    if name not in ("takes_two_arguments", "absent"):
        assert "on talk.mp4" in str(error.value)


class FixedRanker:
    """Ranker with fixed results that records its calls."""

    def __init__(self, *times: float) -> None:
        self.times, self.calls = times, []

    async def rank_frames(self, uri: str, question: str, search: SelectionParams) -> tuple[float, ...]:
        self.calls.append((uri, question, search))
        return self.times


async def test_query_ranks_by_question_without_options(video, chat_format):
    ranker, config = (
        FixedRanker(0.0, 1.0, 5.04),
        FrameSelectorConfig("query", model="clip", candidate_fps=2.0),
    )
    assert await selected_times(video, chat_format, config, ranker) == pytest.approx([0.0, 1.0, 5.04])
    uri, question, search = ranker.calls[0]
    assert (uri, question, search.candidates, search.max_frames) == (
        video,
        QUESTION,
        OverviewRequest(2.0, 512),
        4,
    )


async def test_query_without_ranker_is_rejected():
    with pytest.raises(UserError, match="starts no image-text model"):
        await select(FrameSelectorConfig("query", model="clip"))


async def test_trajectory_records_the_selector(video, chat_format, tmp_path):
    path = index(tmp_path, record([0.0], question="Who sings?"))
    trajectory = await run_with(video, chat_format, FrameSelectorConfig("tspo", index_file=path, on_missing="uniform"))
    assert trajectory.extra == {"overview": {"selector": "tspo", "used_fallback": True}}
    assert (await run_with(video, chat_format, FrameSelectorConfig())).extra == {}


@pytest.mark.parametrize("line", ["A. disc", "(A) disc", "A) disc", "A: disc"])
def test_options_are_stripped_from_the_question(line):
    assert strip_options(f"{QUESTION} {line} (B) ring") == QUESTION
    assert strip_options("How many are there?") == "How many are there?"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "clever"}, "must be one of uniform, count"),
        ({"kind": "tspo"}, "index_file is empty"),
        ({"kind": "query"}, "model is empty"),
        ({"on_missing": "skip"}, "on_missing is 'skip'"),
        ({"segment_share": 1.5}, "segment_share is 1.5"),
        ({"max_candidates": 0}, "max_candidates is 0"),
    ],
)
def test_invalid_setting_is_rejected(values, message):
    with pytest.raises(ValueError, match=message):
        FrameSelectorConfig(**values)
