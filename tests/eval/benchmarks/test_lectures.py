"""Video-MMLU and VideoMMMU: grades, tracks, open answers, images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.eval.benchmarks.factories import JudgedAnswer, metric_values, png, score_answers, touch, write_parquet
from vz_ray.env.task import AnswerType, Task
from vz_ray.eval.benchmarks import AnswerStatus, BenchmarkFiles, load_benchmark
from vz_ray.eval.benchmarks.answer_scoring import score_open
from vz_ray.utils.errors import UserError
from vz_ray.video.frame import FrameSize, OverviewRequest
from vz_ray.video.local_source import LocalFrameSource

TSV = (
    "index\tvideo\tdiscipline\tquestion\tanswer\n"
    '0\tmath_1\tmath\t"Which ""law""\nholds?"\tde Moivre\n'
    "1\tmath_1\tmath\tHow many?\t3\n"
    "2\tphys_1\tphysics\tÜber was?\tÜber Licht\n"
)


def test_accuracy_and_grade_average_over_disciplines(tmp_path: Path) -> None:
    (tmp_path / "Video_MMLU.tsv").write_text(TSV, encoding="utf-8")
    touch(tmp_path, "videos/math_1.mp4")
    benchmark = load_benchmark("video_mmlu", BenchmarkFiles(tmp_path, tmp_path / "videos"))
    assert benchmark.tasks[0].question == 'Which "law"\nholds?'
    assert {task.answer_type for task in benchmark.tasks} == {AnswerType.GRADED}
    assert benchmark.tasks[2].video.endswith("videos/phys_1.mp4")
    verdicts = {"0": JudgedAnswer(True, 4.0), "2": JudgedAnswer(True, 5.0)}
    scored = score_answers(benchmark, ["de Moivre's", None, "light"], lambda r: verdicts[r.task.task_id])
    metrics = metric_values(benchmark, scored)
    # Math: 1 of 2 correct, grades 4 and 0 (no answer). Physics: 1 of 1 correct, grade 5.
    assert metrics["accuracy"] == (0.75, 3)
    assert metrics["grade, 0 to 5"] == (3.5, 3)
    assert metrics["micro"] == (pytest.approx(2 / 3), 3)
    assert metrics["discipline/math"] == (0.5, 2)
    assert metrics["grade, 0 to 5/physics"] == (5.0, 1)


def test_unjudged_answers_are_excluded(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(TSV, encoding="utf-8")
    benchmark = load_benchmark("video_mmlu", BenchmarkFiles(tmp_path, tmp_path))
    scored = score_answers(benchmark, ["x", "x", "x"], lambda r: None)
    assert {result.strict.status for result in scored} == {AnswerStatus.UNJUDGED}
    assert metric_values(benchmark, scored)["accuracy"] == (None, 0)


@pytest.mark.parametrize("row", ["3\tmath_1\tmath\tWhat?", "3\tmath_1\tmath\tWhat?\tx\ty"])
def test_row_with_wrong_number_of_columns_raises(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.tsv").write_text(TSV + row + "\n")
    with pytest.raises(UserError, match=r"a\.tsv: a row has more or fewer columns"):
        load_benchmark("video_mmlu", BenchmarkFiles(tmp_path, tmp_path))


def mmmu(name: str, kind: str = "multiple-choice", **changes: Any) -> dict[str, Any]:
    ten = [f"choice {i}" for i in range(10)]
    return {
        "id": name,
        "question": "Which?",
        "options": ten,
        "answer": "J",
        "question_type": kind,
        "link_selected": "https://example.org",
        **changes,
    }


@pytest.fixture
def mmmu_folder(tmp_path: Path) -> Path:
    tracks = {
        "Perception": [mmmu("dev_Art_Theory_1", "perception", options=["A. one", "B. two"], answer="B")],
        "Comprehension": [mmmu("validation_Math_2"), mmmu("validation_Math_3")],
        "Adaptation": [
            mmmu("test_Finance_4", image={"bytes": png(121, 75), "path": "a.png"}),
            mmmu(
                "test_Physics_5",
                "open",
                options=[],
                answer="1,250.004",
                image={"bytes": png(64, 64), "path": ""},
            ),
        ],
    }
    for track, rows in tracks.items():
        write_parquet(tmp_path / "annotations" / track / "test-00000-of-00001.parquet", rows)
    touch(tmp_path / "videos", "Art/dev_Art_Theory_1.mp4", "Science/validation_Math_2.mp4")
    return tmp_path


def test_videommmu_tracks_options_and_open_answers(mmmu_folder: Path) -> None:
    source = BenchmarkFiles(mmmu_folder / "annotations", mmmu_folder / "videos", image_dir=mmmu_folder / "pictures")
    benchmark = load_benchmark("videommmu", source)
    assert [task.kind for task in benchmark.tasks] == ["Perception"] + ["Comprehension"] * 2 + ["Adaptation"] * 2
    assert benchmark.tasks[0].question == "Which?\nA. one\nB. two"
    assert benchmark.tasks[0].video.endswith("videos/Art/dev_Art_Theory_1.mp4")
    assert benchmark.tasks[1].question.endswith("\nJ. choice 9")
    metrics = metric_values(benchmark, score_answers(benchmark, ["two", "J", "(A)", "choice 9", "about 1250"]))
    assert metrics["overall"] == (0.8, 5)
    assert metrics["track/Comprehension"] == (0.5, 2)
    assert metrics["track/Adaptation"] == (1.0, 2)
    assert metrics["subject/Art_Theory"] == (1.0, 1)


async def test_question_image_becomes_one_frame_video(mmmu_folder: Path) -> None:
    source = BenchmarkFiles(mmmu_folder / "annotations", mmmu_folder / "videos", image_dir=mmmu_folder / "pictures")
    task, same_task = (
        load_benchmark("videommmu", source).tasks[3],
        load_benchmark("videommmu", source).tasks[3],
    )
    assert task.images == same_task.images
    assert task.question.startswith("The image of this question is shown last")
    with LocalFrameSource() as frames:
        clip = await frames.clip(task.images[0], OverviewRequest(1, 1), FrameSize(784, 784 * 8, 28))
        (frame,) = clip.frames
        (resolved,) = await frames.resolve([frame.ref])
    assert np.array_equal(frame.rgb, resolved.rgb)
    height, width = frame.rgb.shape[:2]
    left, right = frame.rgb[:, : width // 4].mean((0, 1)), frame.rgb[:, -width // 4 :].mean((0, 1))
    assert np.abs(left - (250, 10, 10)).max() < 6
    assert np.abs(right).max() < 6
    assert abs(width / height - 121 / 75) < 0.3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (mmmu("test_Math_1"), "'image' is missing.*it is a track without images"),
        (
            mmmu("test_Math_1", image={"bytes": b"no image", "path": ""}),
            "record 0: the image cannot be decoded",
        ),
        (mmmu("test_Math_1", image={"path": "a.png"}), "'image' is .*expected an object with bytes and path"),
        (mmmu("test_Math_1", answer="K", image={"bytes": b"", "path": ""}), "a letter from A to J"),
        (mmmu("Math", image={"bytes": b"", "path": ""}), "'id' is 'Math' .*validation_Art_Theory_12"),
        (
            mmmu("test_Math_1", "essay", image={"bytes": b"", "path": ""}),
            "one of multiple-choice, open, perc",
        ),
    ],
)
def test_malformed_videommmu_record_raises(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    write_parquet(tmp_path / "Adaptation" / "a.parquet", [row])
    with pytest.raises(UserError, match=message):
        load_benchmark("videommmu", BenchmarkFiles(tmp_path / "Adaptation", tmp_path, image_dir=tmp_path / "pictures"))


def test_missing_tracks_are_noted_and_unknown_track_raises(tmp_path: Path) -> None:
    write_parquet(tmp_path / "Perception.parquet", [mmmu("dev_Art_1", "perception")])
    benchmark = load_benchmark("videommmu", BenchmarkFiles(tmp_path / "Perception.parquet", tmp_path))
    assert benchmark.notes == ("track Comprehension is missing", "track Adaptation is missing")
    write_parquet(tmp_path / "x.parquet", [mmmu("dev_Art_1")])
    with pytest.raises(UserError, match="names 0 tracks"):
        load_benchmark("videommmu", BenchmarkFiles(tmp_path / "x.parquet", tmp_path))


@pytest.mark.parametrize(
    ("reference", "answer", "score"),
    [
        ("42", "42.004", 1.0),
        ("42", "42.01", 0.0),
        ("1,250", "$1250", 1.0),
        ("-0.5", "-1/2", 1.0),
        ("Fibonacci", "the Fibonacci sequence", 1.0),
        ("Fibonacci", "a fibonaccian one", 0.0),
        ("Ångström", "ångström", 1.0),
        ("42", "many", None),
        ("42", "40 or 42", None),
        ("x", "  ", None),
    ],
)
def test_open_answers_match_by_number_or_words(reference: str, answer: str, score: float | None) -> None:
    result = score_open(Task("t", "v.mp4", "?", reference), answer)
    assert (result.status is AnswerStatus.PARSED, result.score) == (score is not None, score or 0.0)
