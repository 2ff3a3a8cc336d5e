"""LongVideoReason, TemporalBench and CLEVRER."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.eval.benchmarks.factories import REASON, answered, figures, touch, write_json, write_jsonl
from vz_ray.eval.benchmarks import AnswerStatus, BenchmarkFiles, load_benchmark
from vz_ray.eval.benchmarks.clevrer import parse_letters
from vz_ray.utils.errors import UserError


def reason(number: int, **more: Any) -> dict[str, Any]:
    return {**REASON, "problem_id": number, **more}


def test_longvideoreason_keeps_questions_without_options_and_tells_them_apart(tmp_path: Path) -> None:
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
    found = figures(benchmark, answered(benchmark, ["A", "B", "C", "no idea"]))
    assert found["accuracy"] == (0.5, 4)
    assert found["with readable options"] == (0.5, 2)
    assert found["type/goal"] == (pytest.approx(2 / 3), 3)
    assert found["type/spatial"] == (0.0, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": "B"}, "'answer' is 'B' .*a letter in its tags"),
        ({"answer": "<answer>because</answer>"}, "a letter in its tags"),
        ({"problem_type": "narrative"}, "one of temporal, goal, plot, spatial"),
        ({"videos": ["a.mp4", "b.mp4"]}, "'videos' is .*a path, or a list of one"),
        ({"data_type": "image"}, "expected 'video'"),
    ],
)
def test_a_wrong_field_of_longvideoreason_is_named(tmp_path: Path, change: Any, said: str) -> None:
    file = write_jsonl(tmp_path / "test.jsonl", [reason(0), reason(1, **change)])
    with pytest.raises(UserError, match=f"record 1: field .*{said}"):
        load_benchmark("longvideoreason", BenchmarkFiles(file, tmp_path))


def test_the_rl_schema_is_told_from_longvideoreason(tmp_path: Path) -> None:
    row = {"videos": ["a.mp4"], "problem": "?", "solution": "A", "problem_id": "1"}
    with pytest.raises(UserError, match="it is the RL schema"):
        load_benchmark("longvideoreason", BenchmarkFiles(write_json(tmp_path / "test.json", [row]), tmp_path))


def temporal(number: int, video: str, **more: Any) -> dict[str, Any]:
    return {
        "idx": f"{video}_{number}",
        "video_name": video,
        "category": "Action Order",
        "source_dataset": "Charades",
        "question": "Which caption is best?\nA. He sits, then stands. \nB. He stands, then sits. ",
        "GT": "B",
        **more,
    }


def test_all_questions_of_a_video_must_be_right_for_it_to_count(tmp_path: Path) -> None:
    one, two = "short_video/Charades/a.mp4", "short_video/ActivityNet/b.mp4"
    rows = [
        temporal(0, one),
        temporal(1, one, GT="A", category="Others"),
        temporal(0, two, source_dataset="ActivityNet"),
        temporal(1, two, source_dataset="ActivityNet"),
    ]
    file = write_json(tmp_path / "temporalbench_short_qa.json", rows)
    touch(tmp_path, one)
    benchmark = load_benchmark("temporalbench", BenchmarkFiles(tmp_path, tmp_path))
    assert benchmark.title == "TemporalBench short_qa"
    found = figures(benchmark, answered(benchmark, ["B", "He sits, then stands.", "B", "A"]))
    assert found["binary"] == (0.75, 4)
    assert found["multiple-binary"] == (0.5, 2)
    assert found["data set, multiple-binary/ActivityNet"] == (0.0, 1)
    assert found["category, binary/Action Order"] == (pytest.approx(2 / 3), 3)
    assert found["category, multiple-binary/Action Order"] == (0.5, 2)
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


def test_captions_without_a_model_of_sentences_are_said_to_be_not_measured(tmp_path: Path) -> None:
    write_json(tmp_path / "temporalbench_short_caption.json", [caption(0)])
    benchmark = load_benchmark("temporalbench_caption", BenchmarkFiles(tmp_path, tmp_path))
    assert benchmark.notes == ("captions are not measured: `embedding_model` is not set",)
    marked = answered(benchmark, ["a dog"])
    assert marked[0].strict.status is AnswerStatus.UNJUDGED
    assert figures(benchmark, marked)["cosine"] == (None, 0)
    with pytest.raises(UserError, match=r"no sentence-embedding model at .*config\.json is missing"):
        load_benchmark(
            "temporalbench_caption", BenchmarkFiles(tmp_path, tmp_path, embedding_model_dir=tmp_path)
        )


def sentence_model(folder: Path) -> Path:
    """A tiny BERT of random weights; words are its tokens."""
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


def test_captions_are_compared_by_their_embeddings(tmp_path: Path) -> None:
    write_json(tmp_path / "temporalbench_short_caption.json", [caption(i) for i in range(3)])
    source = BenchmarkFiles(tmp_path, tmp_path, embedding_model_dir=sentence_model(tmp_path / "model"))
    benchmark = load_benchmark("temporalbench_caption", source)
    marked = answered(benchmark, ["a red dog runs", "a blue cat sleeps", None])
    same, other, none = (sample.strict.score for sample in marked)
    assert same == pytest.approx(1.0, abs=1e-5)
    assert 0 <= other < 0.99
    assert none == 0
    assert figures(benchmark, marked)["cosine"] == (pytest.approx((same + other) / 3), 3)


CHOICES = [
    {"choice_id": 0, "choice": "The cube enters", "answer": "correct"},
    {"choice_id": 1, "choice": "The sphere exits", "answer": "wrong"},
    {"choice_id": 2, "choice": "The cylinder stops", "answer": "correct"},
]


def clevrer(*questions: dict[str, Any]) -> list[dict[str, Any]]:
    numbered = [{"question_id": i, "program": [], **values} for i, values in enumerate(questions)]
    return [{"scene_index": 10000, "video_filename": "video_10000.mp4", "questions": numbered}]


def test_clevrer_counts_words_options_and_questions(tmp_path: Path) -> None:
    asked = [
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
    write_json(tmp_path / "validation.json", clevrer(*asked))
    touch(tmp_path, "video_10000-11000/video_10000.mp4")
    benchmark = load_benchmark("clevrer", BenchmarkFiles(tmp_path, tmp_path))
    assert benchmark.tasks[2].question.splitlines()[:4] == [
        "Why?", "A. The cube enters", "B. The sphere exits", "C. The cylinder stops",
    ]  # fmt: skip
    assert [task.answer for task in benchmark.tasks] == ["cube", "0", "A, C", "A, C", "none", "A", "A"]
    said = ["Cube.", "2", "(A) and (C)", "A, B", "None of them", "perhaps", None]
    found = figures(benchmark, answered(benchmark, said))
    assert found["by question"] == (pytest.approx(3 / 7), 7)
    assert found["by question/descriptive"] == (0.5, 2)
    assert found["by question/explanatory"] == (0.5, 2)
    # All three of the first question; of the second, A alone. What cannot be read has no option right.
    assert found["by option/explanatory"] == (pytest.approx(4 / 6), 6)
    assert found["by option/predictive"] == (1.0, 2)
    assert found["by option/counterfactual"] == (0.0, 4)
    assert "by option/descriptive" not in found


@pytest.mark.parametrize(
    ("said", "letters"),
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
def test_sets_of_letters(said: str, letters: str | None) -> None:
    options = {"A": "x", "B": "y", "C": "z"}
    assert parse_letters(said, options) == (None if letters is None else frozenset(letters))


@pytest.mark.parametrize(
    ("question", "said"),
    [
        (
            {"question": "?", "question_type": "descriptive"},
            "question 0: field 'answer' is missing.*test.json",
        ),
        (
            {"question": "?", "question_type": "predictive", "choices": [{"choice_id": 0, "choice": "x"}]},
            "question 0, choice 0: field 'answer' is missing.*it is test.json",
        ),
        ({"question": "?", "question_type": "predictive", "choices": []}, "'choices' is .*expected a list"),
        ({"question": "?", "question_type": "other", "choices": CHOICES}, "one of descriptive, explanatory"),
    ],
)
def test_what_is_not_clevrers_validation_set_is_named(tmp_path: Path, question: Any, said: str) -> None:
    file = write_json(tmp_path / "validation.json", clevrer(question))
    with pytest.raises(UserError, match=said):
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


def compass(folder: Path, **changed: Any) -> Path:
    for name, questions in {**COMPASS, **changed}.items():
        write_json(
            folder / "questions" / f"{name}.json", {"1034": {"action": questions[:1], "order": questions[1:]}}
        )
    return folder / "questions"


def test_tempcompass_by_task_and_aspect(tmp_path: Path) -> None:
    touch(tmp_path, "videos/1034.mp4")
    benchmark = load_benchmark("tempcompass", BenchmarkFiles(compass(tmp_path), tmp_path / "videos"))
    assert [task.answer for task in benchmark.tasks] == ["C", "A", "yes", "no", "B", "A"]
    assert benchmark.tasks[0].task_id == "multi-choice/1034/action/0"
    assert benchmark.num_released == 1580 + 2453 + 1503
    said = ["(C) pass", "B", "Yes, he is.", "it is not", "2", "Sentence A: He sits."]
    marked = answered(benchmark, said)
    assert [sample.strict.status for sample in marked].count(AnswerStatus.UNPARSED) == 1
    found = figures(benchmark, marked)
    assert found["average"] == (pytest.approx((0.5 + 0.5 + 1) / 3), 6)
    assert found["micro"] == (pytest.approx(4 / 6), 6)
    assert found["task/caption_matching"] == (1.0, 2)
    assert found["multi-choice, by aspect/order"] == (0.0, 1)


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("Option 2", "B"),
        ("option 2.", "B"),
        ("He sits", "A"),
        ("Option 1: whatever", "A"),
        ("both", ""),
        ("3", ""),
    ],
)
def test_captions_are_named_by_label_or_text(tmp_path: Path, said: str, letter: str) -> None:
    source = BenchmarkFiles(compass(tmp_path) / "caption_matching.json", tmp_path)
    benchmark = load_benchmark("tempcompass", source)
    marked = answered(benchmark, [said, None])
    assert marked[0].strict.answer == letter


@pytest.mark.parametrize(
    ("changed", "said"),
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
def test_what_is_not_tempcompass_is_named(tmp_path: Path, changed: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_benchmark("tempcompass", BenchmarkFiles(compass(tmp_path, **changed), tmp_path))
