"""LongVideoReason, TemporalBench, CLEVRER and TempCompass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.eval.benchmarks.factories import (
    REASON,
    metric_values,
    score_answers,
    touch,
    write_json,
    write_jsonl,
)
from vz_ray.eval.benchmarks import AnswerStatus, BenchmarkFiles, load_benchmark
from vz_ray.eval.benchmarks.clevrer import parse_letters
from vz_ray.utils.errors import UserError


def reason(number: int, **changes: Any) -> dict[str, Any]:
    return {**REASON, "problem_id": number, **changes}


def test_longvideoreason_reports_questions_without_options(tmp_path: Path) -> None:
    rows = [
        reason(0),
        reason(1, problem_type="spatial", videos=["longvila_videos/other.webm"]),
        reason(2, problem="Who is it?\n\n", answer="<answer>C</answer>"),
        reason(3, problem="Why?\nC. But the user wants several steps.", answer="<answer>C</answer>"),
    ]
    write_jsonl(tmp_path / "test.jsonl", rows)
    touch(tmp_path, "longvideo_eval_subset7/clip.mp4", "longvideo_eval_subset7/other.webm")
    benchmark = load_benchmark("longvideoreason", BenchmarkFiles(tmp_path, tmp_path))
    assert benchmark.tasks[0].video.endswith("longvideo_eval_subset7/clip.mp4")
    assert benchmark.tasks[1].video.endswith("longvideo_eval_subset7/other.webm")
    assert benchmark.notes == ("2 questions have no readable options, first 2",)
    metrics = metric_values(benchmark, score_answers(benchmark, ["A", "B", "C", "no idea"]))
    assert metrics["accuracy"] == (0.5, 4)
    assert metrics["with readable options"] == (0.5, 2)
    assert metrics["type/goal"] == (pytest.approx(2 / 3), 3)
    assert metrics["type/spatial"] == (0.0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "B"}, "'answer' is 'B' .*a letter in answer tags"),
        ({"answer": "<answer>because</answer>"}, "a letter in answer tags"),
        ({"problem_type": "narrative"}, "one of temporal, goal, plot, spatial"),
        ({"videos": ["a.mp4", "b.mp4"]}, "'videos' is .*a path, or a list of one"),
        ({"data_type": "image"}, "expected 'video'"),
    ],
)
def test_malformed_longvideoreason_field_raises(tmp_path: Path, change: Any, message: str) -> None:
    file = write_jsonl(tmp_path / "test.jsonl", [reason(0), reason(1, **change)])
    with pytest.raises(UserError, match=f"record 1: field .*{message}"):
        load_benchmark("longvideoreason", BenchmarkFiles(file, tmp_path))


def test_longvideoreason_rejects_rl_schema(tmp_path: Path) -> None:
    row = {"videos": ["a.mp4"], "problem": "?", "solution": "A", "problem_id": "1"}
    with pytest.raises(UserError, match="it is the RL schema"):
        load_benchmark("longvideoreason", BenchmarkFiles(write_json(tmp_path / "test.json", [row]), tmp_path))


def temporal(number: int, video: str, **changes: Any) -> dict[str, Any]:
    return {
        "idx": f"{video}_{number}",
        "video_name": video,
        "category": "Action Order",
        "source_dataset": "Charades",
        "question": "Which caption is best?\nA. He sits, then stands. \nB. He stands, then sits. ",
        "GT": "B",
        **changes,
    }


def test_multiple_binary_requires_all_questions_of_a_video(tmp_path: Path) -> None:
    video_a, video_b = "short_video/Charades/a.mp4", "short_video/ActivityNet/b.mp4"
    rows = [
        temporal(0, video_a),
        temporal(1, video_a, GT="A", category="Others"),
        temporal(0, video_b, source_dataset="ActivityNet"),
        temporal(1, video_b, source_dataset="ActivityNet"),
    ]
    file = write_json(tmp_path / "temporalbench_short_qa.json", rows)
    touch(tmp_path, video_a)
    benchmark = load_benchmark("temporalbench", BenchmarkFiles(tmp_path, tmp_path))
    assert benchmark.title == "TemporalBench short_qa"
    metrics = metric_values(benchmark, score_answers(benchmark, ["B", "He sits, then stands.", "B", "A"]))
    assert metrics["binary"] == (0.75, 4)
    assert metrics["multiple-binary"] == (0.5, 2)
    assert metrics["data set, multiple-binary/ActivityNet"] == (0.0, 1)
    assert metrics["category, binary/Action Order"] == (pytest.approx(2 / 3), 3)
    assert metrics["category, multiple-binary/Action Order"] == (0.5, 2)
    write_json(file, [{key: value for key, value in rows[0].items() if key != "GT"}])
    with pytest.raises(UserError, match="field 'GT' is missing"):
        load_benchmark("temporalbench", BenchmarkFiles(file, tmp_path))


def caption(number: int) -> dict[str, Any]:
    return {
        "idx": number,
        "video_name": f"short_video/{number}.mp4",
        "dataset": "Charades",
        "question": "Describe the video.",
        "GT": "a red dog runs",
    }


def test_captions_without_embedding_model_are_unscored(tmp_path: Path) -> None:
    write_json(tmp_path / "temporalbench_short_caption.json", [caption(0)])
    benchmark = load_benchmark("temporalbench_caption", BenchmarkFiles(tmp_path, tmp_path))
    assert benchmark.notes == ("captions are not scored: `embedding_model` is not set",)
    scored = score_answers(benchmark, ["a dog"])
    assert scored[0].strict.status is AnswerStatus.UNJUDGED
    assert metric_values(benchmark, scored)["cosine"] == (None, 0)
    with pytest.raises(UserError, match=r"no sentence-embedding model at .*config\.json is missing"):
        load_benchmark("temporalbench_caption", BenchmarkFiles(tmp_path, tmp_path, embedding_model_dir=tmp_path))


def sentence_model(folder: Path) -> Path:
    """Save a tiny BERT with random weights and a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "a", "red", "blue", "dog", "cat", "runs", "sleeps"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    tokens.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    return folder


def test_captions_score_by_cosine_similarity(tmp_path: Path) -> None:
    write_json(tmp_path / "temporalbench_short_caption.json", [caption(i) for i in range(3)])
    source = BenchmarkFiles(tmp_path, tmp_path, embedding_model_dir=sentence_model(tmp_path / "model"))
    benchmark = load_benchmark("temporalbench_caption", source)
    scored = score_answers(benchmark, ["a red dog runs", "a blue cat sleeps", None])
    same, different, missing = (result.strict.score for result in scored)
    assert same == pytest.approx(1.0, abs=1e-5)
    assert 0 <= different < 0.99
    assert missing == 0
    assert metric_values(benchmark, scored)["cosine"] == (pytest.approx((same + different) / 3), 3)


CHOICES = [
    {"choice_id": 0, "choice": "The cube enters", "answer": "correct"},
    {"choice_id": 1, "choice": "The sphere exits", "answer": "wrong"},
    {"choice_id": 2, "choice": "The cylinder stops", "answer": "correct"},
]


def clevrer(*questions: dict[str, Any]) -> list[dict[str, Any]]:
    numbered = [{"question_id": i, "program": [], **values} for i, values in enumerate(questions)]
    return [{"scene_index": 10000, "video_filename": "video_10000.mp4", "questions": numbered}]


def test_clevrer_metrics_by_question_and_option(tmp_path: Path) -> None:
    questions = [
        {
            "question": "What shape?",
            "question_type": "descriptive",
            "question_subtype": "q",
            "answer": "cube",
        },
        {"question": "How many?", "question_type": "descriptive", "answer": "0"},
        {"question": "Why?", "question_type": "explanatory", "choices": CHOICES},
        {"question": "Why?", "question_type": "explanatory", "choices": CHOICES},
        {
            "question": "What then?",
            "question_type": "predictive",
            "choices": [{**CHOICES[1]}, {**CHOICES[1]}],
        },
        {"question": "If?", "question_type": "counterfactual", "choices": CHOICES[:2]},
        {"question": "If?", "question_type": "counterfactual", "choices": CHOICES[:2]},
    ]
    write_json(tmp_path / "validation.json", clevrer(*questions))
    touch(tmp_path, "video_10000-11000/video_10000.mp4")
    benchmark = load_benchmark("clevrer", BenchmarkFiles(tmp_path, tmp_path))
    assert benchmark.tasks[2].question.splitlines()[:4] == [
        "Why?", "A. The cube enters", "B. The sphere exits", "C. The cylinder stops",
    ]  # fmt: skip
    assert [task.answer for task in benchmark.tasks] == ["cube", "0", "A, C", "A, C", "none", "A", "A"]
    answers = ["Cube.", "2", "(A) and (C)", "A, B", "None of them", "perhaps", None]
    metrics = metric_values(benchmark, score_answers(benchmark, answers))
    assert metrics["by question"] == (pytest.approx(3 / 7), 7)
    assert metrics["by question/descriptive"] == (0.5, 2)
    assert metrics["by question/explanatory"] == (0.5, 2)
    # 3 correct options in the first question, 1 (A) in the second; unparsed answers have none.
    assert metrics["by option/explanatory"] == (pytest.approx(4 / 6), 6)
    assert metrics["by option/predictive"] == (1.0, 2)
    assert metrics["by option/counterfactual"] == (0.0, 4)
    assert "by option/descriptive" not in metrics


@pytest.mark.parametrize(
    ("answer", "letters"),
    [
        ("A", "A"),
        ("a, c", "AC"),
        ("A and C.", "AC"),
        ("The answer is (B), (C)", "BC"),
        (r"\boxed{A, B, C}", "ABC"),
        ("None", ""),
        ("D", None),
        ("A because it moves", None),
        ("", None),
    ],
)
def test_parse_letters(answer: str, letters: str | None) -> None:
    options = {"A": "x", "B": "y", "C": "z"}
    assert parse_letters(answer, options) == (None if letters is None else frozenset(letters))


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (
            {"question": "?", "question_type": "descriptive"},
            "question 0: field 'answer' is missing.*test.json",
        ),
        (
            {"question": "?", "question_type": "predictive", "choices": [{"choice_id": 0, "choice": "x"}]},
            "question 0, choice 0: field 'answer' is missing.*it is test.json",
        ),
        ({"question": "?", "question_type": "predictive", "choices": []}, "'choices' is .*a non-empty list"),
        ({"question": "?", "question_type": "other", "choices": CHOICES}, "one of descriptive, explanatory"),
    ],
)
def test_malformed_clevrer_record_raises(tmp_path: Path, question: Any, message: str) -> None:
    file = write_json(tmp_path / "validation.json", clevrer(question))
    with pytest.raises(UserError, match=message):
        load_benchmark("clevrer", BenchmarkFiles(file, tmp_path))


COMPASS: dict[str, list[dict[str, str]]] = {
    "multi-choice": [
        {"question": "What does he do?\nA. dunk\nB. dribble\nC. pass", "answer": "C. pass"},
        {"question": "What does he do?\nA. dunk\nB. dribble", "answer": "A. dunk"},
    ],
    "yes_no": [{"question": "Is he dunking?", "answer": "yes"}, {"question": "Is it red?", "answer": "no"}],
    "caption_matching": [
        {"question": "Which?\nOption 1: He sits.\nOption 2: He runs.", "answer": "Option 2: He runs."},
        {"question": "Which?\nSentence A: He sits.\nSentence B: He runs.", "answer": "Sentence A: He sits."},
    ],
}


def write_compass(folder: Path, **changes: Any) -> Path:
    for name, questions in {**COMPASS, **changes}.items():
        write_json(folder / "questions" / f"{name}.json", {"1034": {"action": questions[:1], "order": questions[1:]}})
    return folder / "questions"


def test_tempcompass_by_task_and_aspect(tmp_path: Path) -> None:
    touch(tmp_path, "videos/1034.mp4")
    benchmark = load_benchmark("tempcompass", BenchmarkFiles(write_compass(tmp_path), tmp_path / "videos"))
    assert [task.answer for task in benchmark.tasks] == ["C", "A", "yes", "no", "B", "A"]
    assert benchmark.tasks[0].task_id == "multi-choice/1034/action/0"
    assert benchmark.num_released == 1580 + 2453 + 1503
    answers = ["(C) pass", "B", "Yes, he is.", "it is not", "2", "Sentence A: He sits."]
    scored = score_answers(benchmark, answers)
    assert [result.strict.status for result in scored].count(AnswerStatus.UNPARSED) == 1
    metrics = metric_values(benchmark, scored)
    assert metrics["average"] == (pytest.approx((0.5 + 0.5 + 1) / 3), 6)
    assert metrics["micro"] == (pytest.approx(4 / 6), 6)
    assert metrics["task/caption_matching"] == (1.0, 2)
    assert metrics["multi-choice, by aspect/order"] == (0.0, 1)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("Option 2", "B"),
        ("option 2.", "B"),
        ("He sits", "A"),
        ("Option 1: whatever", "A"),
        ("both", ""),
        ("3", ""),
    ],
)
def test_caption_matches_by_label_or_text(tmp_path: Path, answer: str, letter: str) -> None:
    source = BenchmarkFiles(write_compass(tmp_path) / "caption_matching.json", tmp_path)
    benchmark = load_benchmark("tempcompass", source)
    scored = score_answers(benchmark, [answer, None])
    assert scored[0].strict.answer == letter


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"yes_no": [{"question": "?", "answer": "maybe"}]},
            "action, question 0: field 'answer' is 'maybe'.*yes, no",
        ),
        (
            {"multi-choice": [{"question": "?\nA. x\nB. y", "answer": "C. z"}]},
            "one of the question's options",
        ),
        (
            {"caption_matching": [{"question": "?\nOption 1: x", "answer": "x"}]},
            "one of the question's captions",
        ),
        ({"caption_matching": [{"question": "?"}]}, "field 'answer' is missing"),
    ],
)
def test_malformed_tempcompass_record_raises(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_benchmark("tempcompass", BenchmarkFiles(write_compass(tmp_path, **changes), tmp_path))
