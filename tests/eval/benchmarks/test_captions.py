"""VDC and TempCompass's captioning: captions judged by what they say about questions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.eval.benchmarks.factories import answered, figures, touch, write_json, write_jsonl
from vz_ray.data.episode_record import task_from_dict, task_to_dict
from vz_ray.env.task import AnswerType, CaptionQuestion
from vz_ray.eval.benchmarks import BenchmarkFiles, JudgedAnswer, load_benchmark
from vz_ray.eval.benchmarks.vdc import CAPTION_PROMPTS
from vz_ray.utils.errors import UserError


def asked(*questions: tuple[str, str]) -> list[dict[str, str]]:
    return [{"question": q, "answer": a, "category": "object"} for q, a in questions]


def write_vdc(root: Path, files: Mapping[str, Sequence[Any]]) -> Path:
    folder = root / "VDCScore_qa"
    folder.mkdir(parents=True)
    for name in CAPTION_PROMPTS:
        write_jsonl(folder / f"{name}.jsonl", files.get(name, [{"a-1": asked(("Who?", "a dog"))}]))
    return root


def test_a_captions_questions_are_those_of_its_kind_and_video(tmp_path: Path) -> None:
    rows = [
        {"a-1": asked(("Who?", "a cat"))},
        {"mixkit-2": asked(("Where?", "a room "), ("", ""))},
        {"a-1": asked(("Who?", "a dog"), ("Why?", "to explore"))},
    ]
    write_vdc(tmp_path, {"main_object": rows})
    touch(tmp_path / "videos", "part_1/a-1.mp4", "part_2/mixkit-2.MP4")
    benchmark = load_benchmark("vdc", BenchmarkFiles(tmp_path, tmp_path / "videos"))
    assert [task.task_id for task in benchmark.tasks] == [
        "camera/a-1", "short/a-1", "background/a-1",
        "main_object/a-1", "main_object/mixkit-2", "detailed/a-1",
    ]  # fmt: skip
    first, second = benchmark.tasks[3:5]
    assert first.caption_questions == (
        CaptionQuestion("Who?", "a dog"),
        CaptionQuestion("Why?", "to explore"),
    )
    assert second.caption_questions == (CaptionQuestion("Where?", "a room"),)
    assert second.video.endswith("part_2/mixkit-2.MP4")
    assert (first.answer_type, first.question) == (AnswerType.CAPTION, CAPTION_PROMPTS["main_object"])
    assert benchmark.notes == (
        "main_object.jsonl: 1 questions without words were left out",
        "main_object.jsonl: 1 videos have two lists of questions, and the later one counts",
    )
    assert benchmark.num_released == 5133
    assert task_from_dict(json.loads(json.dumps(task_to_dict(first)))) == first


def test_vdcscore_is_a_mean_over_captions_and_over_kinds(tmp_path: Path) -> None:
    rows = [{"a-1": asked(("Who?", "a dog"))}, {"b-2": asked(("Who?", "a cat"))}]
    write_vdc(tmp_path, {"camera": rows, "short": rows})
    benchmark = load_benchmark("vdc", BenchmarkFiles(tmp_path, tmp_path))
    verdicts = {
        "camera/a-1": JudgedAnswer(0.5, 2.5),
        "camera/b-2": JudgedAnswer(0.0, 0.5),
        "short/a-1": JudgedAnswer(1.0, 5.0),
        "short/b-2": JudgedAnswer(0.25, 1.0),
        "background/a-1": JudgedAnswer(0.75, 4.0),
        "detailed/a-1": JudgedAnswer(0.5, 2.0),
    }
    said = [None if task.kind == "main_object" else "A dog." for task in benchmark.tasks]
    found = figures(benchmark, answered(benchmark, said, lambda r: verdicts[r.task.task_id]))
    # Camera (0.5 + 0) / 2, short (1 + 0.25) / 2, background 0.75, main object 0 (no caption), detailed 0.5.
    assert found["accuracy"] == (pytest.approx((0.25 + 0.625 + 0.75 + 0 + 0.5) / 5), 7)
    assert found["grade, 0 to 5"] == (pytest.approx((1.5 + 3.0 + 4.0 + 0 + 2.0) / 5), 7)
    assert found["micro"] == (pytest.approx(3.0 / 7), 7)
    assert found["kind/camera"] == (0.25, 2)
    assert found["grade, 0 to 5/short"] == (3.0, 2)
    # The released script passes over captions that say nothing right.
    assert found["accuracy, released script"] == (pytest.approx((0.5 + 0.625 + 0.75 + 0.5) / 4), 5)
    assert found["kind, without captions that say nothing right/camera"] == (0.5, 1)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"a-1": []}], "record 0: field 'a-1' is .*expected a list"),
        ([{"a-1": [{"question": "Who?"}]}], "record 0, video a-1, question 0: field 'answer' is missing"),
        ([{"a-1": asked(("Who?", "x"))}, []], "record 1: expected an object"),
        ([{"a-1": [{"question": 1, "answer": "x"}]}], "field 'question' is 1"),
    ],
)
def test_what_is_not_vdc_is_named(tmp_path: Path, rows: Sequence[Any], said: str) -> None:
    write_vdc(tmp_path, {"short": rows})
    with pytest.raises(UserError, match=said):
        load_benchmark("vdc", BenchmarkFiles(tmp_path, tmp_path))


def test_one_kind_can_be_read_alone(tmp_path: Path) -> None:
    write_vdc(tmp_path, {})
    one = load_benchmark("vdc", BenchmarkFiles(tmp_path / "VDCScore_qa" / "short.jsonl", tmp_path))
    assert [task.kind for task in one.tasks] == ["short"]
    other = write_jsonl(tmp_path / "VDC_1k.jsonl", [{"a-1": asked(("Who?", "x"))}])
    with pytest.raises(UserError, match=r"VDC_1k\.jsonl: VDC's files are camera\.jsonl"):
        load_benchmark("vdc", BenchmarkFiles(other, tmp_path))


CHOICES = ["What does he do?\nA. dunk\nB. dribble\nC. pass", "Which is it?\nA. pass\nB. dunk\nC. dribble"]


def compass(root: Path, *aspects: str) -> Path:
    """The question files of one video, with two questions for each aspect."""
    choices = [{"question": CHOICES[0], "answer": "A. dunk"}, {"question": CHOICES[1], "answer": "B. dunk"}]
    captions = [
        {"question": f"One of these is so; write a caption.\nInformation {i}", "answer": "B. dunk"}
        for i in range(2)
    ]
    write_json(root / "questions" / "multi-choice.json", {"103": {"action": choices, "order": choices}})
    write_json(root / "questions" / "captioning.json", {"103": dict.fromkeys(aspects, captions)})
    return root


def test_tempcompasss_captions_are_judged_by_the_first_choice_question(tmp_path: Path) -> None:
    benchmark = load_benchmark(
        "tempcompass_caption", BenchmarkFiles(compass(tmp_path, "action", "order"), tmp_path)
    )
    assert [task.task_id for task in benchmark.tasks] == [
        *(f"captioning/103/{aspect}/{index}" for aspect in ("action", "order") for index in range(2))
    ]
    # Letters are those of the choice question, not of the information that the caption is chosen from.
    assert {task.caption_questions for task in benchmark.tasks} == {
        (CaptionQuestion(CHOICES[0], "A", AnswerType.MULTIPLE_CHOICE),)
    }
    assert (benchmark.tasks[0].answer, benchmark.num_released) == ("B. dunk", 2004)
    verdicts = iter([JudgedAnswer(True), JudgedAnswer(False), JudgedAnswer(True), JudgedAnswer(True)])
    found = figures(benchmark, answered(benchmark, ["He dunks."] * 4, lambda r: next(verdicts)))
    assert found == {"accuracy": (0.75, 4), "aspect/action": (0.5, 2), "aspect/order": (1.0, 2)}


def test_a_caption_without_a_choice_question_is_named(tmp_path: Path) -> None:
    compass(tmp_path, "action", "speed")
    said = r"captioning\.json, video 103, speed, question 0: multi-choice\.json has no question"
    with pytest.raises(UserError, match=said):
        load_benchmark("tempcompass_caption", BenchmarkFiles(tmp_path, tmp_path))
