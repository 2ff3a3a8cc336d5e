"""Parsing of judge replies, and validation of judge prompt files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vz_ray.rewards.judge_protocol import (
    JudgeForm,
    JudgePrompt,
    JudgeVerdict,
    is_valid_reply,
    parse_verdict,
    strip_reasoning,
)
from vz_ray.utils.errors import UserError


@pytest.mark.parametrize(
    ("reply", "correct"),
    [
        ("1", True),
        ("0", False),
        (" 1\n", True),
        ("1.", True),
        ("**1**", True),
        ("Verdict: 0", False),
        ("score = 1", True),
        ("The answer is: 1", True),
        ("(1)", True),
        ("<think>It says 0 somewhere, {'a': 2}.</think>\n1", True),
    ],
)
def test_binary_reply_is_one_or_zero(reply: str, correct: bool) -> None:
    assert parse_verdict(JudgeForm.BINARY, reply) == JudgeVerdict(correct)


@pytest.mark.parametrize(
    "reply",
    ["", "2", "10", "1 0", "-1", "0.5", "1/1", "yes", "right", "1 because it matches", "I give it a 1",
     "not 1", "<think>1", "<think>1</think>", "{'pred': 'yes', 'score': 5}"],
)  # fmt: skip
def test_malformed_binary_reply_is_rejected(reply: str) -> None:
    assert parse_verdict(JudgeForm.BINARY, reply) is None


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("{'pred': 'yes', 'score': 4}", JudgeVerdict(True, 4.0)),
        ('{"pred": "no", "score": 0}', JudgeVerdict(False, 0.0)),
        ("```python\n{'pred': 'Yes', 'score': 5}\n```", JudgeVerdict(True, 5.0)),
        ("Sure: {'pred': 'no', 'score': 2.5}.", JudgeVerdict(False, 2.5)),
        ("{'pred': ' no ', 'score': '3'}", JudgeVerdict(False, 3.0)),
        ("{'score': 3, 'pred': 'yes', 'why': 'close'}", JudgeVerdict(True, 3.0)),
        ("<think>{'pred': 'no', 'score': 0}</think>{'pred': 'yes', 'score': 5}", JudgeVerdict(True, 5.0)),
    ],
)
def test_graded_reply_is_json_or_python_dict(reply: str, verdict: JudgeVerdict) -> None:
    assert parse_verdict(JudgeForm.GRADED, reply) == verdict


@pytest.mark.parametrize(
    "reply",
    ["", "1", "yes", "yes, 4", "{'pred': 'yes'}", "{'score': 4}", "{'pred': 'maybe', 'score': 4}",
     "{'pred': True, 'score': 4}", "{'pred': 'yes', 'score': 6}", "{'pred': 'yes', 'score': -1}",
     "{'pred': 'yes', 'score': None}", "{'pred': 'yes', 'score': True}", '{"pred": "yes", "score": NaN}',
     "{'pred': 'yes', 'score': 'high'}", "{'pred': 'yes', 'score': 4", "['yes', 4]", "{yes, 4}",
     "{'pred': 'yes', 'score': 4} {'pred': 'no', 'score': 1}", "{'pred': 'yes', 'score': 4 + 1j}",
     "{'pred': __import__('os'), 'score': 4}"],
)  # fmt: skip
def test_malformed_graded_reply_is_rejected(reply: str) -> None:
    assert parse_verdict(JudgeForm.GRADED, reply) is None


@settings(deadline=None)
@given(st.sampled_from(JudgeForm), st.text(alphabet="01{}'\":, yesnopredscore<think>/\n", max_size=60))
def test_parser_never_raises(form: JudgeForm, reply: str) -> None:
    verdict = parse_verdict(form, reply)
    assert verdict is None or (verdict.score is None) == (form is JudgeForm.BINARY)


@pytest.mark.parametrize(("name", "form"), [("judge", JudgeForm.BINARY), ("judge-graded", JudgeForm.GRADED)])
def test_shipped_prompts_can_be_formatted(name: str, form: JudgeForm) -> None:
    prompt = JudgePrompt.load(f"conf/prompt/{name}.yaml", form)
    system, user = prompt.messages("Why {x}?", "be{cause}", "{answer}")
    assert "{{" not in system["content"]
    assert "Why {x}?" in user["content"]
    assert "<answer>{answer}</answer>" in user["content"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("system: a", "its keys must be system, user"),
        ("system: a\nuser: b\nmore: c", "its keys must be system, user"),
        ("system: 1\nuser: '{question}{truth}{answer}'", "system is 1; it must be a text"),
        ("- a", "its keys must be system, user"),
        ("system: [", "cannot read"),
        ("system: a\nuser: '{question}{truth}'", "user lacks {answer}"),
        ("system: a\nuser: '{question}{truth}{answer}{frames}'", "cannot be formatted"),
        ("system: '{'\nuser: '{question}{truth}{answer}'", "cannot be formatted"),
    ],
)
def test_invalid_prompt_file_is_reported(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        JudgePrompt.load(path, JudgeForm.BINARY)
    assert str(path) in str(caught.value)


def test_missing_prompt_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.yaml"):
        JudgePrompt.load(tmp_path / "missing.yaml", JudgeForm.BINARY)


def test_reading_prompt_must_not_contain_truth(tmp_path: Path) -> None:
    prompt = JudgePrompt.load("conf/prompt/judge-caption.yaml", JudgeForm.READING)
    _, user = prompt.messages("Why {x}?", "be{cause}", "A dog {runs}.")
    assert "Why {x}?" in user["content"]
    assert "<description>A dog {runs}.</description>" in user["content"]
    assert "be{cause}" not in user["content"]
    path = tmp_path / "mine.yaml"
    path.write_text("system: a\nuser: '{question}{truth}{answer}'")
    with pytest.raises(UserError, match=r"user must not have \{truth\}"):
        JudgePrompt.load(path, JudgeForm.READING)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("red", "red"),
        ("<think>blue? no</think> red\n", "red"),
        ("Reasoning: it says so.\nAnswer: B. dunking", "B. dunking"),
        (" \n", ""),
        ("<think>red</think>", ""),
    ],
)
def test_reasoning_is_stripped_from_caption_answer(reply: str, answer: str) -> None:
    assert strip_reasoning(reply) == answer
    assert is_valid_reply(JudgeForm.READING, reply) == bool(answer)
