"""Every selector gives an ordinary clip, and what breaks its contract is named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.video.making import Made, make
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.selector import SelectorConfig
from vz_ray.data.task import Task
from vz_ray.episode.protocols import Prompt
from vz_ray.episode.runner import play
from vz_ray.episode.selectors import question_alone, selector_of
from vz_ray.episode.trajectory import EpisodeId, Sampling, Status, Trajectory, Written
from vz_ray.observe.errors import UserError
from vz_ray.video.choice import Search
from vz_ray.video.frame import Overview, VideoInfo
from vz_ray.video.local import LocalFrames

OWN = "tests.episode.own_selectors"
RULES = EpisodeConfig(overview_frames=4, min_pixels=784, max_pixels=784)
INFO = VideoInfo("blake3:0", "talk.mp4", 0, duration_s=12.8, fps=25.0, width=96, height=64)
QUESTION = "What flashes while the red border is shown?"
TASK = Task("needle/7", "talk.mp4", f"{QUESTION}\nA. disc\nB. ring", "A")


class Answers:
    def __init__(self, wire) -> None:
        self.wire = wire

    async def act(self, prompt: Prompt, sampling: Sampling, *, request: str) -> Written:
        text = "<think>x</think><answer>A</answer>"
        return Written(text, self.wire.written(text))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    """320 frames at 25 fps, a keyframe every second."""
    made = Made("talk.mp4", gop=25, options={"sc_threshold": "0"})
    return str(make(tmp_path_factory.mktemp("videos"), made))


def index(folder: Path, *records: object) -> str:
    path = folder / "TSPO_MLVU_frameIdx.json"
    path.write_text(json.dumps(list(records)))
    return str(path)


def record(frames: Sequence[object], **fields: object) -> dict[str, object]:
    made = {
        "video": "1_plotQA/talk.mp4",
        "duration": 12.8,
        "question": QUESTION,
        "candidates": ["disc", "ring"],
    }
    return {**made, "answer": "disc", "question_type": "plotQA", **fields, "frame_idx": list(frames)}


async def played(video: str, wire, selector: SelectorConfig, ranker=None) -> Trajectory:
    task, rules = replace(TASK, video=video), replace(RULES, selector=selector)
    with LocalFrames() as frames:
        return await play(
            task,
            Answers(wire),
            frames,
            wire,
            rules,
            id=EpisodeId(0, "t", 0),
            sampling=Sampling(),
            ranker=ranker,
        )


async def shown(video: str, wire, selector: SelectorConfig, ranker=None) -> list[float]:
    trajectory = await played(video, wire, selector, ranker)
    assert trajectory.status is Status.ANSWERED, trajectory.error
    return [ref.pts_s for ref in trajectory.prompt.refs]


async def chosen(config: SelectorConfig, task: Task = TASK, most: int = 4):
    return await selector_of(config).select(task, INFO, Overview(0.5, most))


@pytest.mark.parametrize(
    ("selector", "times"),
    [
        (SelectorConfig(), [0.0, 3.2, 6.4, 9.6]),
        (SelectorConfig("count"), [0.0, 3.2, 6.4, 9.6]),
        (SelectorConfig("keyframes"), [0.0, 3.0, 6.0, 10.0]),
        (SelectorConfig(f"{OWN}:ends"), [0.0, 12.76]),
    ],
    ids=lambda value: value.kind if isinstance(value, SelectorConfig) else "",
)
async def test_an_episode_is_played_on_what_the_selector_shows(video, wire, selector, times):
    assert await shown(video, wire, selector) == pytest.approx(times)


async def test_tspo_shows_the_frames_of_the_questions_own_record(video, wire, tmp_path):
    other = record([1.0, 2.0], question="What flashes while the blue border is shown?")
    elsewhere = record([3.0], video="other.mp4")
    path = index(tmp_path, other, elsewhere, record([0.0, 25.0, 25.0, 319.0]))
    assert await shown(video, wire, SelectorConfig("tspo", index=path)) == pytest.approx([0.0, 1.0, 12.76])


async def test_tspo_above_the_cap_is_thinned_evenly(tmp_path):
    path = index(tmp_path, record([float(k) for k in range(64)]))
    selection = await chosen(SelectorConfig("tspo", index=path), most=4)
    assert selection.request.numbers == (0, 16, 32, 48)


async def test_a_tspo_frame_that_the_file_does_not_have_fails_the_episode(video, wire, tmp_path):
    path = index(tmp_path, record([0.0, 320.0]))
    trajectory = await played(video, wire, SelectorConfig("tspo", index=path))
    assert trajectory.status is Status.FAILED
    assert "frame 320 was chosen" in trajectory.error


async def test_a_question_that_tspo_lacks_is_an_error_or_counted(tmp_path):
    path = index(tmp_path, record([0.0], question="Who sings?"))
    with pytest.raises(UserError, match=r"no record of task 'needle/7' on talk\.mp4.*missing=uniform"):
        await chosen(SelectorConfig("tspo", index=path))
    selection = await chosen(SelectorConfig("tspo", index=path, missing="uniform"))
    assert (selection.request, selection.fell_back) == (Overview(0.5, 4), True)


async def test_options_or_ids_tell_records_of_the_same_question_apart(tmp_path):
    cross = record([1.0], candidates=["cross", "disc"], question_id="6")
    ring = record([2.0], candidates=["disc", "ring"], question_id="6")
    path = index(tmp_path, cross, ring)
    assert (await chosen(SelectorConfig("tspo", index=path))).request.numbers == (2,)
    path = index(tmp_path / "..", *(record([float(k)], question_id=str(k)) for k in (5, 7)))
    assert (await chosen(SelectorConfig("tspo", index=path))).request.numbers == (7,)


async def test_records_that_cannot_be_told_apart_are_an_error(tmp_path):
    path = index(tmp_path, record([1.0]), record([2.0]))
    with pytest.raises(UserError, match="records 0 and 1 both fit task 'needle/7'"):
        await chosen(SelectorConfig("tspo", index=path))


async def test_the_record_of_videomme_is_found_by_its_video_id(tmp_path):
    row = {"video_id": "001", "videoID": "talk", "question_id": "001-1", "question": QUESTION}
    path = index(tmp_path, {**row, "options": ["A. disc", "B. ring"], "frame_idx": [4.0]})
    assert (await chosen(SelectorConfig("tspo", index=path))).request.numbers == (4,)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([2.0, 1.0], "record 0: frame_idx holds 1.0; numbers must ascend"),
        ([-1.0], "holds -1.0"),
        (["x"], "holds 'x', which is no frame number"),
        ([float("nan")], "holds nan"),
        ([], "must be a list of frame numbers"),
    ],
)
async def test_an_index_with_broken_frames_is_refused(tmp_path, frames, message):
    folder = tmp_path / message[:8].strip()
    folder.mkdir()
    with pytest.raises(UserError, match=message):
        await chosen(SelectorConfig("tspo", index=index(folder, record(frames))))


async def test_an_index_that_is_not_there_or_not_one_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the TSPO index .*none\.json"):
        await chosen(SelectorConfig("tspo", index=str(tmp_path / "none.json")))
    (tmp_path / "text.json").write_text("frames")
    with pytest.raises(UserError, match="not valid JSON"):
        await chosen(SelectorConfig("tspo", index=str(tmp_path / "text.json")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_many", "returned 5 frames; at most 4 can be shown"),
        ("unsorted", "returned 1 s after 2 s; times must ascend"),
        ("twice", "returned 1 s twice"),
        ("not_finite", "returned nan, which is not finite"),
        ("outside", r"returned 13\.8 s; the video is from 0 to 12\.8 s"),
        ("negative", "returned -1 s"),
        ("nothing", "returned no frame"),
        ("no_numbers", "returned None"),
        ("fails", "raised LookupError: no scenes of What flashes"),
        ("takes_two", r"cannot be called with \(video, question, most\)"),
        ("absent", "has no function 'absent'; its functions are ends"),
    ],
)
async def test_a_function_that_breaks_the_contract_is_named_with_video_and_value(name, message):
    with pytest.raises(UserError, match=message) as raised:
        await chosen(SelectorConfig(f"{OWN}:{name}"))
    assert f"'{OWN}:{name}'" in str(raised.value)
    if name not in ("takes_two", "absent"):
        assert "on talk.mp4" in str(raised.value)


class Fixed:
    """An image-text model that has made up its mind."""

    def __init__(self, *times: float) -> None:
        self.times, self.asked = times, []

    async def rank(self, uri: str, question: str, search: Search) -> tuple[float, ...]:
        self.asked.append((uri, question, search))
        return self.times


async def test_query_asks_about_the_question_alone_and_shows_what_it_gets(video, wire):
    ranker, config = Fixed(0.0, 1.0, 5.04), SelectorConfig("query", model="clip", candidate_fps=2.0)
    assert await shown(video, wire, config, ranker) == pytest.approx([0.0, 1.0, 5.04])
    uri, question, search = ranker.asked[0]
    assert (uri, question, search.grid, search.most) == (video, QUESTION, Overview(2.0, 512), 4)


async def test_query_without_a_model_is_refused():
    with pytest.raises(UserError, match="starts no image-text model"):
        await chosen(SelectorConfig("query", model="clip"))


async def test_the_trajectory_says_who_chose(video, wire, tmp_path):
    path = index(tmp_path, record([0.0], question="Who sings?"))
    trajectory = await played(video, wire, SelectorConfig("tspo", index=path, missing="uniform"))
    assert trajectory.extra == {"overview": {"selector": "tspo", "fell_back": True}}
    assert (await played(video, wire, SelectorConfig())).extra == {}


@pytest.mark.parametrize("line", ["A. disc", "(A) disc", "A) disc", "A: disc"])
def test_options_are_left_out_of_what_is_looked_for(line):
    assert question_alone(f"{QUESTION} {line} (B) ring") == QUESTION
    assert question_alone("How many are there?") == "How many are there?"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "clever"}, "must be one of uniform, count"),
        ({"kind": "tspo"}, "index is empty"),
        ({"kind": "query"}, "model is empty"),
        ({"missing": "skip"}, "missing is 'skip'"),
        ({"segments": 1.5}, "segments is 1.5"),
        ({"candidates": 0}, "candidates is 0"),
    ],
)
def test_settings_that_make_no_sense_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        SelectorConfig(**values)
