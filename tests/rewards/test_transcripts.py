"""Scorers on thousands of transcripts that are combined from pieces.

The expected result comes from the tables' columns, which list the documented effect of each piece.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import pytest

from vz_ray.config.reward import RewardConfig
from vz_ray.env.task import Task
from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    ExternalAction,
    RejectedZoom,
    TokenContext,
    Trajectory,
    Turn,
    ZoomErrorKind,
)
from vz_ray.rewards import choice_correct, choice_correct_compat, is_well_formed, parse_options, score_episode
from vz_ray.video.frame import ZoomRequest

# -- multiple choice, scorer `compat` ----------------------------------------------
# Placeholders: @ and # are two letters, ~ is the first in lower case. A span is correct for the letters in
# its columns: the whole text without a trailing period, the content of the last box, and the last capital
# letter before a period.

SPANS = [
    # text                      whole  boxed  pointed
    ("@",                       "@",   "",    ""),
    ("  @\n",                   "@",   "",    ""),
    ("@.",                      "@",   "",    "@"),
    (r"\boxed{@}",              "",    "@",   ""),
    (r"$\boxed{@}$",            "",    "@",   ""),
    (r"So \boxed{@}.",          "",    "@",   ""),
    (r"\boxed{#} or \boxed{@}", "",    "@",   ""),
    (r"\boxed{@}, not #.",      "",    "@",   "#"),
    ("@. a cross",              "",    "",    "@"),
    ("The answer is @.",        "",    "",    "@"),
    ("Answer: @.",              "",    "",    "@"),
    ("#. no, @. yes",           "",    "",    "@"),
    ("@. and not #.",           "",    "",    "#"),
    ("@. It was on TV.",        "",    "",    "V"),
    ("(@)",                     "",    "",    ""),
    ("(@).",                    "",    "",    ""),
    ("@)",                      "",    "",    ""),
    ("@: a cross",              "",    "",    ""),
    ("Answer: @",               "",    "",    ""),
    ("Option @",                "",    "",    ""),
    ("~",                       "",    "",    ""),
    ("~.",                      "",    "",    ""),
    ("**@**",                   "",    "",    ""),
    ("@ or #",                  "",    "",    ""),
    ("@ @",                     "",    "",    ""),
    ("a cross",                 "",    "",    ""),
    ("",                        "",    "",    ""),
]  # fmt: skip

BEFORE = ["", "<think>Maybe #. Yes.</think>\n", r"<think>\boxed{#}</think>", "<answer>#</answer> no: "]
"""Text before the last span, which must not count."""

BARE = [
    # transcripts without a pair of answer tags, searched as a whole
    ("@",                                    "@", "",  ""),
    ("I am sure it is @.",                   "",  "",  "@"),
    ("<think>#. fits.</think> It is @.",     "",  "",  "@"),
    ("<think>@. fits.</think> It is #",      "",  "",  "@"),
    (r"<think>\boxed{@}</think> #.",         "",  "@", "#"),
    ("<answer>@",                            "",  "",  ""),
    ("<answer>@.",                           "",  "",  "@"),
    ("@</answer>",                           "",  "",  ""),
    ("</answer>@.<answer>",                  "",  "",  "@"),
    ("It is (@) or ~",                       "",  "",  ""),
]  # fmt: skip

WORDS = [
    ("yes, it is", True), ("yes, it is.", True), (r"\boxed{yes, it is}", True), ("yes, it is..", False),
    ("Yes, it is", False), ("yes", False), ("yes, it is B.", False), ("I say yes, it is", False),
]  # fmt: skip
"""Spans, and whether each is correct for the truth `yes, it is`."""

PAIRS = [("A", "B"), ("B", "A"), ("C", "D"), ("D", "E"), ("E", "A"), ("F", "C"), ("G", "B"), ("J", "A")]


def fill_letters(text: str, first: str, second: str) -> str:
    return text.replace("@", first).replace("#", second).replace("~", first.lower())


def choice_cases() -> Iterator[tuple[str, str, bool]]:
    """Yield transcript, truth, and whether the documented scorer accepts it."""
    for (first, second), truth_column in product(PAIRS, "@#VI"):
        columns = {"@": first, "#": second, "V": "V", "I": "I", "": None}
        truth = columns[truth_column]
        assert truth is not None
        for before, (text, *effects) in product(BEFORE, SPANS):
            transcript = fill_letters(f"{before}<answer>{text}</answer>", first, second)
            yield transcript, truth, truth in {columns[effect] for effect in effects}
        for text, *effects in BARE:
            yield fill_letters(text, first, second), truth, truth in {columns[effect] for effect in effects}
    for before, (text, correct) in product(BEFORE, WORDS):
        yield f"{before.replace('#', 'B')}<answer>{text}</answer>", "yes, it is", correct


def test_compat_follows_documentation() -> None:
    seen: set[tuple[str, str]] = set()
    num_correct = 0
    for transcript, truth, expected in choice_cases():
        assert choice_correct_compat(transcript, truth) is expected, (transcript, truth)
        seen.add((transcript, truth))
        num_correct += expected
    assert len(seen) > 3000
    assert num_correct > 500


# -- format ---------------------------------------------------------------------
# A turn is <think>..</think>, then any text, then one pair of the turn's tags. Each tuple lists the valid and
# the invalid pieces of one slot of a turn.

THINK = (
    ["<think>x</think>", "<think></think>", "<think>two\nlines, <b>tags</b></think>", "\n <think>x</think>"],
    ["", "x", "<think>x", "x</think>", "</think>x<think>", "<think>x</think><think>y</think>",
     "Well. <think>x</think>"],
)  # fmt: skip
BETWEEN = (["", " ", "\nSo: ", "I look at {3}. "], ["<think>", "</think>"])
CALL = (
    ['{"segment": [0, 8], "fps": 2}', ' {"fps": 2, "segment": [1.5, 2.5]} ', '{"segment": [3, 19], "fps": 1}',
     '{"segment": [0, 0.5], "fps": 30}', '{"segment":\n[100, 116.5],\n"fps": 1.0}'],
    ["", "{}", "now", '{"segment": [0, 8]}', '{"fps": 2}', '{"segment": [0, 8], "fps": 2, "why": 1}',
     '{"segment": [0, 8], "fps": 2', "{'segment': [0, 8], 'fps': 2}", '{"segment": [8, 0], "fps": 2}',
     '{"segment": [8], "fps": 2}', '{"segment": [0, 1, 2], "fps": 2}', '{"segment": "0-8", "fps": 2}',
     '{"segment": [0, "8"], "fps": 2}', '{"segment": [0, 8], "fps": null}', '{"segment": [0, 8], "fps": 0}',
     '{"segment": [0, 8], "fps": -2}', '{"segment": [0, 17], "fps": 1}', '{"segment": [0, 8], "fps": 2.2}',
     '{"segment": [0, 0.1], "fps": 1}', '{"segment": [4, 4], "fps": 1}', '{"segment": [-4, 4], "fps": 1}',
     '{"segment": [0, NaN], "fps": 1}', '{"segment": [0, 8], "fps": true}',
     '[{"segment": [0, 8], "fps": 2}]'],
)  # fmt: skip
ZOOM_TAGS = (
    ["<video_zoom>%</video_zoom>"],
    ["%", "<video_zoom>%", "%</video_zoom>", "</video_zoom>%<video_zoom>", "<video_zoom>%<video_zoom>",
     "<video_zoom>%</video_zoom><video_zoom>%</video_zoom>", "<video_zoom>%</video_zoom><answer>A</answer>",
     "<answer>A</answer><video_zoom>%</video_zoom>", "<video_zoom>%</video_zoom></answer>"],
)  # fmt: skip
ANSWER_TAGS = (
    ["<answer>%</answer>"],
    ["", "%", "<answer>%", "%</answer>", "</answer>%<answer>", "<answer>%</answer><answer>%</answer>",
     "<answer>%</answer></answer>", "<answer>%</answer><video_zoom>",
     '<answer>%</answer><video_zoom>{"segment": [0, 8], "fps": 2}</video_zoom>',
     '<video_zoom>{"segment": [0, 8], "fps": 2}</video_zoom><answer>%</answer>'],
)  # fmt: skip
AFTER = (["", "\n", "<|im_end|>", " <|im_end|>\n"], [" and more", "<|im_end|><|im_end|>"])

VALID_WORDS = ["A", "", "three times", "A\nB", "<b>x</b>"]
ZOOM_SLOTS = (THINK, BETWEEN, CALL, ZOOM_TAGS, AFTER)
ANSWER_SLOTS = (THINK, BETWEEN, (VALID_WORDS, []), ANSWER_TAGS, AFTER)
Slots = tuple[tuple[list[str], list[str]], ...]


@dataclass(frozen=True)
class FormatCase:
    """Turns, and whether all pieces are valid."""

    turns: tuple[str, ...]
    valid: bool


def make_turn(rng: random.Random, slots: Slots, fault: tuple[int, str] | None = None) -> str:
    """Combine valid pieces; `fault` replaces the piece of one slot."""
    pieces = [rng.choice(valid) for valid, _ in slots]
    if fault is not None:
        pieces[fault[0]] = fault[1]
    think, between, inner, tags, after = pieces
    return think + between + tags.replace("%", inner) + after


def format_cases() -> Iterator[FormatCase]:
    """Yield valid transcripts of 1 to 5 turns, and every fault in every slot of every turn."""
    rng = random.Random(0)
    for zooms in range(5):
        kinds: list[Slots] = [ZOOM_SLOTS] * zooms + [ANSWER_SLOTS]
        for _ in range(120):
            yield FormatCase(tuple(make_turn(rng, slots) for slots in kinds), True)
        for faulty_turn, slots in enumerate(kinds):
            faults = [(slot, text) for slot, (_, invalid) in enumerate(slots) for text in invalid]
            for fault in faults:
                turns = tuple(make_turn(rng, s, fault if k == faulty_turn else None) for k, s in enumerate(kinds))
                yield FormatCase(turns, False)
        yield FormatCase(tuple(make_turn(rng, ZOOM_SLOTS) for _ in range(zooms)), False)
        for swapped in range(zooms):
            wrong_order = [*kinds]
            wrong_order[swapped], wrong_order[-1] = ANSWER_SLOTS, ZOOM_SLOTS
            yield FormatCase(tuple(make_turn(rng, slots) for slots in wrong_order), False)


def test_format_check_follows_documentation() -> None:
    seen: dict[tuple[str, ...], bool] = {}
    for case in format_cases():
        assert is_well_formed(case.turns) is case.valid, case.turns
        seen[case.turns] = case.valid
    assert len(seen) > 1000
    assert sum(seen.values()) > 300


# -- total reward, scorer `compat` -------------------------------------------------


def make_episode(rng: random.Random, zooms: int, words: str, fault: bool) -> tuple[Trajectory, bool, int]:
    """Return an episode with the answer `words`, whether it is well formed, and the number of zoom calls."""
    turns, valid = [], not fault
    faulty_turn = rng.randrange(zooms) if fault and zooms else -1
    for k in range(zooms):
        invalid_call = (2, rng.choice(CALL[1])) if k == faulty_turn else None
        text = make_turn(rng, ZOOM_SLOTS, invalid_call)
        zoom = RejectedZoom(ZoomErrorKind.INVALID_JSON, "no") if invalid_call else ZoomRequest(0, 8, 2)
        turns.append(Turn(ExternalAction(text, ()), text, zoom, TokenContext((3,))))
    answer_fault = (0, "no thoughts") if fault and not zooms else None
    last = make_turn(rng, ANSWER_SLOTS, answer_fault).replace("<answer>", "<ANSWER>")
    start, _, tail = last.partition("<ANSWER>")
    last = f"{start}<answer>{words}</answer>{tail.partition('</answer>')[2]}"
    turns.append(Turn(ExternalAction(last, ()), last, None, None))
    trajectory = Trajectory(
        EpisodeId(0, "t", 0),
        "compat",
        TokenContext((1,)),
        tuple(turns),
        EpisodeStatus.ANSWERED,
        words.strip(),
    )
    return trajectory, valid, zooms


def test_compat_total_rewards_attempted_zooms() -> None:
    rng, config, seen = random.Random(0), RewardConfig(scorer="compat"), 0
    for (text, *effects), (first, second), zooms, fault in product(SPANS, PAIRS, range(5), (False, True)):
        trajectory, valid, attempts = make_episode(rng, zooms, fill_letters(text, first, second), fault)
        correct = first in {{"@": first, "#": second, "V": "V", "": None}[effect] for effect in effects}
        parts = score_episode(trajectory, Task("t", "v.mp4", "What? A. a B. b", first), config)
        tool = correct and attempts > 0
        assert (parts.accuracy, parts.format, parts.tool) == (correct, valid, tool), trajectory.turns
        assert parts.total == pytest.approx(0.9 * correct + 0.1 * valid + 0.5 * tool)
        seen += 1
    assert seen > 1000


# -- multiple choice, scorer `clean` -----------------------------------------------

FORMS = [
    "@", "@.", "(@)", "@)", "Answer: @", "~", "(~)", "~.", r"\boxed{@}", r"$\boxed{@}$", r"\boxed{(@)}",
    r"\boxed{\text{@}}", "**@**", " @\n", "[@]", "The answer is @.", "The correct answer is (@).", "Option @",
    "@. option %", "(@) option %", "@: option %", "option %", "Option %.",
]  # fmt: skip
"""Notations for an option with the text `option %`. The released scorer rejects most of them."""


@pytest.mark.parametrize("style", ["{}.", "({})", "{})", "{}:"])
@pytest.mark.parametrize("count", range(3, 11))
def test_clean_parses_all_notations_inside_span_only(count: int, style: str) -> None:
    letters = "ABCDEFGHIJ"[:count]
    question = "What flashes?\n" + "\n".join(f"{style.format(c)} option {c * 2}" for c in letters)
    options = parse_options(question)
    assert list(options) == list(letters)
    for form, letter in product(FORMS, letters):
        answer = fill_letters(form, letter, "").replace("%", letter * 2)
        other = next(c for c in letters if c != letter)
        assert choice_correct(answer, letter, options) is True, answer
        assert choice_correct(answer, other, options) is False, answer
        inside = f"<think>It is {other}.</think><answer>{answer}</answer>"
        assert clean_accuracy(inside, answer, question, letter) == 1
        assert clean_accuracy(f"<think>It is {answer}.</think>", None, question, letter) == 0


def clean_accuracy(text: str, answer: str | None, question: str, truth: str) -> float:
    """Score a one-turn episode with `clean`."""
    status = EpisodeStatus.NO_ANSWER if answer is None else EpisodeStatus.ANSWERED
    turns = (Turn(ExternalAction(text, ()), text, None, None),)
    trajectory = Trajectory(EpisodeId(0, "t", 0), "clean", TokenContext((1,)), turns, status, answer)
    return score_episode(trajectory, Task("t", "v.mp4", question, truth), RewardConfig()).accuracy
