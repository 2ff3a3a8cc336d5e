"""Format check of single transcripts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vz_ray.rewards.format import is_well_formed

ANSWER = "<think>It is a disc.</think> So <answer>A</answer>"


def zoom(call: str = '{"segment": [1.5, 5.5], "fps": 2}', before: str = "<think>Look.</think> ") -> str:
    return f"{before}<video_zoom>{call}</video_zoom>"


@pytest.mark.parametrize(
    "turns",
    [
        [ANSWER],
        [f" {ANSWER} <|im_end|>"],
        ["<think></think><answer></answer>"],
        [zoom(), ANSWER],
        [zoom(), zoom(' {"fps": 1, "segment": [0, 16]} '), ANSWER],
        [zoom('{"segment": [0, 16.5], "fps": 1}'), ANSWER],
        [zoom() + "<|im_end|>", ANSWER],
    ],
)
def test_accepts_well_formed_transcripts(turns: list[str]) -> None:
    assert is_well_formed(turns)


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [""],
        ["<answer>A</answer>"],
        ["<think>a</think>"],
        ["<answer>A</answer><think>a</think>"],
        ["<think>a<answer>A</answer>"],
        ["<think>a</think><think>b</think><answer>A</answer>"],
        [ANSWER + "<answer>B</answer>"],
        [ANSWER + " and more"],
        ["Well. " + ANSWER],
        [ANSWER + zoom(before="")],
        [ANSWER, ANSWER],
        [zoom()],
        [zoom(before=""), ANSWER],
        [zoom() + zoom(before=""), ANSWER],
        [zoom(before="<think>a</think><answer>A</answer>"), ANSWER],
    ],
)
def test_rejects_malformed_transcripts(turns: list[str]) -> None:
    assert not is_well_formed(turns)


@pytest.mark.parametrize(
    "call",
    [
        "", "{", "[]", "3", '{"segment": [1, 2]}', '{"segment": [1, 2], "fps": 2, "x": 1}',
        '{"segment": [1], "fps": 2}',
        '{"segment": [5, 1], "fps": 2}', '{"segment": [1, 1], "fps": 2}', '{"segment": [-1, 1], "fps": 2}',
        '{"segment": [0, 17], "fps": 1}', '{"segment": [0, 0.1], "fps": 1}', '{"segment": [0, 4], "fps": 0}',
        '{"segment": [0, 4], "fps": "2"}', '{"segment": [0, NaN], "fps": 2}',
        '{"segment": [0, Infinity], "fps": 2}',
        '{"segment": [true, 4], "fps": 2}', '{"segment": [0, 1e400], "fps": 2}', "[" * 100_000,
        '{"segment": [0, 1' + "0" * 400 + '], "fps": 1}',
    ],
)  # fmt: skip
def test_rejects_turn_with_invalid_call(call: str) -> None:
    assert not is_well_formed([zoom(call), ANSWER])


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40), st.sampled_from([0.1, 0.5, 1, 2, 4, 30]), st.integers(1, 32))
def test_frame_limit_matches_environment(start: int, frames: int, fps: float, limit: int) -> None:
    call = json.dumps({"segment": [start, start + frames / fps], "fps": fps})
    assert is_well_formed([zoom(call), ANSWER], limit) is (frames <= limit)
