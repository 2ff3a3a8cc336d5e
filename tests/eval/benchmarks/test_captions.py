"""VDC and TempCompass captioning: captions judged through questions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.eval.benchmarks.factories import JudgedAnswer, metric_values, score_answers, touch, write_json, write_jsonl
from vz_ray.data.episode_record import task_from_dict, task_to_dict
from vz_ray.env.task import AnswerType, CaptionQuestion
from vz_ray.eval.benchmarks import BenchmarkFiles, load_benchmark
from vz_ray.eval.benchmarks.vdc import CAPTION_PROMPTS
from vz_ray.utils.errors import UserError


def qa_pairs(*questions: tuple[str, str]) -> list[dict[str, str]]:
    return [{"question": q, "answer": a, "category": "object"} for q, a in questions]


def write_vdc(root: Path, files: Mapping[str, Sequence[Any]]) -> Path:
    folder = root / "VDCScore_qa"
    folder.mkdir(parents=True)
    for name in CAPTION_PROMPTS:
        write_jsonl(folder / f"{name}.jsonl", files.get(name, [{"a-1": qa_pairs(("Who?", "a dog"))}]))
    return root


def test_vdc_questions_match_kind_and_video(tmp_path: Path) -> None:
    rows = [
        {"a-1": qa_pairs(("Who?", "a cat"))},
        {"mixkit-2": qa_pairs(("Where?", "a room "), ("", ""))},
        {"a-1": qa_pairs(("Who?", "a dog"), ("Why?", "to explore"))},
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
        "main_object.jsonl: 1 blank questions were skipped",
        "main_object.jsonl: 1 videos have two lists of questions; the last one is used",
    )
    assert benchmark.num_released == 5133
    assert task_from_dict(json.loads(json.dumps(task_to_dict(first)))) == first


def test_vdcscore_averages_over_captions_then_kinds(tmp_path: Path) -> None:
    rows = [{"a-1": qa_pairs(("Who?", "a dog"))}, {"b-2": qa_pairs(("Who?", "a cat"))}]
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
    captions = [None if task.kind == "main_object" else "A dog." for task in benchmark.tasks]
    metrics = metric_values(benchmark, score_answers(benchmark, captions, lambda r: verdicts[r.task.task_id]))
    # Camera (0.5 + 0) / 2, short (1 + 0.25) / 2, background 0.75, main object 0 (no caption), detailed 0.5.
    assert metrics["accuracy"] == (pytest.approx((0.25 + 0.625 + 0.75 + 0 + 0.5) / 5), 7)
    assert metrics["grade, 0 to 5"] == (pytest.approx((1.5 + 3.0 + 4.0 + 0 + 2.0) / 5), 7)
    assert metrics["micro"] == (pytest.approx(3.0 / 7), 7)
    assert metrics["kind/camera"] == (0.25, 2)
    assert metrics["grade, 0 to 5/short"] == (3.0, 2)
    # The released script excludes captions of score 0.
    assert metrics["accuracy, released script"] == (pytest.approx((0.5 + 0.625 + 0.75 + 0.5) / 4), 5)
    assert metrics["kind, without captions of score 0/camera"] == (0.5, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"a-1": []}], "record 0: field 'a-1' is .*expected a non-empty list"),
        ([{"a-1": [{"question": "Who?"}]}], "record 0, video a-1, question 0: field 'answer' is missing"),
        ([{"a-1": qa_pairs(("Who?", "x"))}, []], "record 1: expected an object"),
        ([{"a-1": [{"question": 1, "answer": "x"}]}], "field 'question' is 1"),
    ],
)
def test_malformed_vdc_record_raises(tmp_path: Path, rows: Sequence[Any], message: str) -> None:
    write_vdc(tmp_path, {"short": rows})
    with pytest.raises(UserError, match=message):
        load_benchmark("vdc", BenchmarkFiles(tmp_path, tmp_path))


def test_single_vdc_file_is_accepted(tmp_path: Path) -> None:
    write_vdc(tmp_path, {})
    benchmark = load_benchmark("vdc", BenchmarkFiles(tmp_path / "VDCScore_qa" / "short.jsonl", tmp_path))
    assert [task.kind for task in benchmark.tasks] == ["short"]
    other = write_jsonl(tmp_path / "VDC_1k.jsonl", [{"a-1": qa_pairs(("Who?", "x"))}])
    with pytest.raises(UserError, match=r"VDC_1k\.jsonl: VDC's files are camera\.jsonl"):
        load_benchmark("vdc", BenchmarkFiles(other, tmp_path))


CHOICES = ["What does he do?\nA. dunk\nB. dribble\nC. pass", "Which is it?\nA. pass\nB. dunk\nC. dribble"]


def write_compass(root: Path, *aspects: str) -> Path:
    """Write the question files of one video, with two questions per aspect."""
    choices = [{"question": CHOICES[0], "answer": "A. dunk"}, {"question": CHOICES[1], "answer": "B. dunk"}]
    captions = [
        {"question": f"One of these is so; write a caption.\nInformation {i}", "answer": "B. dunk"} for i in range(2)
    ]
    write_json(root / "questions" / "multi-choice.json", {"103": {"action": choices, "order": choices}})
    write_json(root / "questions" / "captioning.json", {"103": dict.fromkeys(aspects, captions)})
    return root


def test_tempcompass_captions_use_first_choice_question(tmp_path: Path) -> None:
    benchmark = load_benchmark(
        "tempcompass_caption", BenchmarkFiles(write_compass(tmp_path, "action", "order"), tmp_path)
    )
    assert [task.task_id for task in benchmark.tasks] == [
        *(f"captioning/103/{aspect}/{index}" for aspect in ("action", "order") for index in range(2))
    ]
    # The letters are those of the choice question, not of the caption's options.
    assert {task.caption_questions for task in benchmark.tasks} == {
        (CaptionQuestion(CHOICES[0], "A", AnswerType.MULTIPLE_CHOICE),)
    }
    assert (benchmark.tasks[0].answer, benchmark.num_released) == ("B. dunk", 2004)
    verdicts = iter([JudgedAnswer(True), JudgedAnswer(False), JudgedAnswer(True), JudgedAnswer(True)])
    metrics = metric_values(benchmark, score_answers(benchmark, ["He dunks."] * 4, lambda r: next(verdicts)))
    assert metrics == {"accuracy": (0.75, 4), "aspect/action": (0.5, 2), "aspect/order": (1.0, 2)}


def test_caption_without_choice_question_raises(tmp_path: Path) -> None:
    write_compass(tmp_path, "action", "speed")
    message = r"captioning\.json, video 103, speed, question 0: multi-choice\.json has no question"
    with pytest.raises(UserError, match=message):
        load_benchmark("tempcompass_caption", BenchmarkFiles(tmp_path, tmp_path))
