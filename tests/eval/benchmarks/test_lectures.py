"""Video-MMLU and VideoMMMU: grades, tracks, open answers, pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.eval.benchmarks.factories import answered, figures, touch, write_parquet
from vz_ray.env.task import AnswerType, Task
from vz_ray.eval.benchmarks import AnswerStatus, BenchmarkFiles, JudgedAnswer, load_benchmark
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


def test_accuracy_and_grade_are_means_over_disciplines(tmp_path: Path) -> None:
    (tmp_path / "Video_MMLU.tsv").write_text(TSV, encoding="utf-8")
    touch(tmp_path, "videos/math_1.mp4")
    benchmark = load_benchmark("video_mmlu", BenchmarkFiles(tmp_path, tmp_path / "videos"))
    assert benchmark.tasks[0].question == 'Which "law"\nholds?'
    assert {task.answer_type for task in benchmark.tasks} == {AnswerType.GRADED}
    assert benchmark.tasks[2].video.endswith("videos/phys_1.mp4")
    verdicts = {"0": JudgedAnswer(True, 4.0), "2": JudgedAnswer(True, 5.0)}
    marked = answered(benchmark, ["de Moivre's", None, "light"], lambda r: verdicts[r.task.task_id])
    found = figures(benchmark, marked)
    # Mathematics: one of two, grades 4 and 0 (no answer); physics: one of one, grade 5.
    assert found["accuracy"] == (0.75, 3)
    assert found["grade, 0 to 5"] == (3.5, 3)
    assert found["micro"] == (pytest.approx(2 / 3), 3)
    assert found["discipline/math"] == (0.5, 2)
    assert found["grade, 0 to 5/physics"] == (5.0, 1)


def test_what_no_judge_judged_is_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(TSV, encoding="utf-8")
    benchmark = load_benchmark("video_mmlu", BenchmarkFiles(tmp_path, tmp_path))
    marked = answered(benchmark, ["x", "x", "x"], lambda r: None)
    assert {sample.strict.status for sample in marked} == {AnswerStatus.UNJUDGED}
    assert figures(benchmark, marked)["accuracy"] == (None, 0)


@pytest.mark.parametrize("row", ["3\tmath_1\tmath\tWhat?", "3\tmath_1\tmath\tWhat?\tx\ty"])
def test_a_row_with_other_columns_than_the_head_is_an_error(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.tsv").write_text(TSV + row + "\n")
    with pytest.raises(UserError, match=r"a\.tsv: a row has . columns"):
        load_benchmark("video_mmlu", BenchmarkFiles(tmp_path, tmp_path))


def png(width: int, height: int) -> bytes:
    """A picture, as bytes of a PNG file."""
    rgb = np.zeros((height, width, 3), np.uint8)
    rgb[:, : width // 2] = (250, 10, 10)
    file = io.BytesIO()
    with av.open(file, "w", format="image2pipe") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def mmmu(name: str, kind: str = "multiple-choice", **more: Any) -> dict[str, Any]:
    ten = [f"choice {i}" for i in range(10)]
    return {
        "id": name,
        "question": "Which?",
        "options": ten,
        "answer": "J",
        "question_type": kind,
        "link_selected": "https://example.org",
        **more,
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


def test_three_tracks_options_to_j_and_an_open_number(mmmu_folder: Path) -> None:
    source = BenchmarkFiles(
        mmmu_folder / "annotations", mmmu_folder / "videos", image_dir=mmmu_folder / "pictures"
    )
    benchmark = load_benchmark("videommmu", source)
    assert [task.kind for task in benchmark.tasks] == ["Perception"] + ["Comprehension"] * 2 + [
        "Adaptation"
    ] * 2
    assert benchmark.tasks[0].question == "Which?\nA. one\nB. two"
    assert benchmark.tasks[0].video.endswith("videos/Art/dev_Art_Theory_1.mp4")
    assert benchmark.tasks[1].question.endswith("\nJ. choice 9")
    found = figures(benchmark, answered(benchmark, ["two", "J", "(A)", "choice 9", "about 1250"]))
    assert found["overall"] == (0.8, 5)
    assert found["track/Comprehension"] == (0.5, 2)
    assert found["track/Adaptation"] == (1.0, 2)
    assert found["subject/Art_Theory"] == (1.0, 1)


async def test_the_image_of_a_question_becomes_a_video_of_one_frame(mmmu_folder: Path) -> None:
    source = BenchmarkFiles(
        mmmu_folder / "annotations", mmmu_folder / "videos", image_dir=mmmu_folder / "pictures"
    )
    first, again = load_benchmark("videommmu", source).tasks[3], load_benchmark("videommmu", source).tasks[3]
    assert first.images == again.images
    assert first.question.startswith("The image of this question is shown last")
    with LocalFrameSource() as frames:
        clip = await frames.overview(first.images[0], OverviewRequest(1, 1), FrameSize(784, 784 * 8))
        (shown,) = clip.frames
        (resolved,) = await frames.resolve([shown.ref])
    assert np.array_equal(shown.rgb, resolved.rgb)
    height, width = shown.rgb.shape[:2]
    left, right = shown.rgb[:, : width // 4].mean((0, 1)), shown.rgb[:, -width // 4 :].mean((0, 1))
    assert np.abs(left - (250, 10, 10)).max() < 6
    assert np.abs(right).max() < 6
    assert abs(width / height - 121 / 75) < 0.3


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (mmmu("test_Math_1"), "'image' is missing.*it is a track without images"),
        (
            mmmu("test_Math_1", image={"bytes": b"no image", "path": ""}),
            "record 0: its image cannot be decoded",
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
def test_what_is_not_videommmu_is_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    write_parquet(tmp_path / "Adaptation" / "a.parquet", [row])
    with pytest.raises(UserError, match=said):
        load_benchmark(
            "videommmu", BenchmarkFiles(tmp_path / "Adaptation", tmp_path, image_dir=tmp_path / "pictures")
        )


def test_tracks_that_are_not_there_are_noted_and_a_file_of_no_track_is_an_error(tmp_path: Path) -> None:
    write_parquet(tmp_path / "Perception.parquet", [mmmu("dev_Art_1", "perception")])
    benchmark = load_benchmark("videommmu", BenchmarkFiles(tmp_path / "Perception.parquet", tmp_path))
    assert benchmark.notes == ("the track Comprehension is not there", "the track Adaptation is not there")
    write_parquet(tmp_path / "x.parquet", [mmmu("dev_Art_1")])
    with pytest.raises(UserError, match="whose track is it"):
        load_benchmark("videommmu", BenchmarkFiles(tmp_path / "x.parquet", tmp_path))


@pytest.mark.parametrize(
    ("truth", "said", "score"),
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
def test_open_answers_by_number_or_words(truth: str, said: str, score: float | None) -> None:
    mark = score_open(Task("t", "v.mp4", "?", truth), said)
    assert (mark.status is AnswerStatus.PARSED, mark.score) == (score is not None, score or 0.0)
