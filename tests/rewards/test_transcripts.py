"""Thousands of transcripts put together from pieces whose effect is written beside them.

What is expected is never computed as the scorers do: it follows from the
table's columns, which state the documented behaviour piece by piece.
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

# -- multiple choice, as the released scorer reads it ---------------------------
# @ and # stand for two letters, ~ for the first in lower case. A span is right for whatever letter stands
# in one of its columns: what it is as a whole (a trailing point dropped), what is in its last box, and the
# last capital that is followed by a point. All else is wrong, however clear to a person.

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
"""What stands before the last span: it never counts where there is a span."""

BARE = [
    # a transcript without a pair of answer tags: it is searched as a whole
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
"""Spans, and whether each is right for the truth `yes, it is`."""

PAIRS = [("A", "B"), ("B", "A"), ("C", "D"), ("D", "E"), ("E", "A"), ("F", "C"), ("G", "B"), ("J", "A")]


def filled(text: str, one: str, other: str) -> str:
    return text.replace("@", one).replace("#", other).replace("~", one.lower())


def choices() -> Iterator[tuple[str, str, bool]]:
    """Transcript, truth, and whether the documented scorer finds it right."""
    for (one, other), which in product(PAIRS, "@#VI"):
        columns = {"@": one, "#": other, "V": "V", "I": "I", "": None}
        truth = columns[which]
        assert truth is not None
        for before, (text, *effects) in product(BEFORE, SPANS):
            transcript = filled(f"{before}<answer>{text}</answer>", one, other)
            yield transcript, truth, truth in {columns[effect] for effect in effects}
        for text, *effects in BARE:
            yield filled(text, one, other), truth, truth in {columns[effect] for effect in effects}
    for before, (text, right) in product(BEFORE, WORDS):
        yield f"{before.replace('#', 'B')}<answer>{text}</answer>", "yes, it is", right


def test_compat_agrees_with_its_documented_behaviour() -> None:
    seen: set[tuple[str, str]] = set()
    right = 0
    for transcript, truth, expected in choices():
        assert choice_correct_compat(transcript, truth) is expected, (transcript, truth)
        seen.add((transcript, truth))
        right += expected
    assert len(seen) > 3000
    assert right > 500


# -- the shape of a transcript --------------------------------------------------
# A turn is <think>..</think>, then anything, then one pair of the turn's own tags. Each column is a place
# in a turn; of each place, what is sound and what is not.

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

SOUND_WORDS = ["A", "", "three times", "A\nB", "<b>x</b>"]
ZOOM_PLACES = (THINK, BETWEEN, CALL, ZOOM_TAGS, AFTER)
ANSWER_PLACES = (THINK, BETWEEN, (SOUND_WORDS, []), ANSWER_TAGS, AFTER)
Places = tuple[tuple[list[str], list[str]], ...]


@dataclass(frozen=True)
class Script:
    """Turns, and whether each of their pieces is sound."""

    turns: tuple[str, ...]
    sound: bool


def turn_of(rng: random.Random, places: Places, fault: tuple[int, str] | None = None) -> str:
    """A turn of sound pieces, but for the `fault` at one place."""
    pieces = [rng.choice(sound) for sound, _ in places]
    if fault is not None:
        pieces[fault[0]] = fault[1]
    think, between, inner, tags, after = pieces
    return think + between + tags.replace("%", inner) + after


def scripts() -> Iterator[Script]:
    """Sound transcripts of 1 to 5 turns, and every fault at every place of every turn of them."""
    rng = random.Random(0)
    for zooms in range(5):
        kinds: list[Places] = [ZOOM_PLACES] * zooms + [ANSWER_PLACES]
        for _ in range(120):
            yield Script(tuple(turn_of(rng, places) for places in kinds), True)
        for at, places in enumerate(kinds):
            faults = [(place, text) for place, (_, unsound) in enumerate(places) for text in unsound]
            for fault in faults:
                turns = tuple(turn_of(rng, p, fault if k == at else None) for k, p in enumerate(kinds))
                yield Script(turns, False)
        yield Script(tuple(turn_of(rng, ZOOM_PLACES) for _ in range(zooms)), False)
        for at in range(zooms):
            wrong_order = [*kinds]
            wrong_order[at], wrong_order[-1] = ANSWER_PLACES, ZOOM_PLACES
            yield Script(tuple(turn_of(rng, places) for places in wrong_order), False)


def test_the_format_check_agrees_with_its_documented_behaviour() -> None:
    seen: dict[tuple[str, ...], bool] = {}
    for script in scripts():
        assert is_well_formed(script.turns) is script.sound, script.turns
        seen[script.turns] = script.sound
    assert len(seen) > 1000
    assert sum(seen.values()) > 300


# -- the whole compat score -----------------------------------------------------


def played(rng: random.Random, zooms: int, words: str, fault: bool) -> tuple[Trajectory, bool, int]:
    """An episode that ends with `words` in its answer span; whether it is well formed; zooms attempted."""
    turns, sound = [], not fault
    at = rng.randrange(zooms) if fault and zooms else -1
    for k in range(zooms):
        unsound = (2, rng.choice(CALL[1])) if k == at else None
        text = turn_of(rng, ZOOM_PLACES, unsound)
        zoom = RejectedZoom(ZoomErrorKind.INVALID_JSON, "no") if unsound else ZoomRequest(0, 8, 2)
        turns.append(Turn(ExternalAction(text, ()), text, zoom, TokenContext((3,))))
    fault_here = (0, "no thoughts") if fault and not zooms else None
    last = turn_of(rng, ANSWER_PLACES, fault_here).replace("<answer>", "<ANSWER>")
    start, _, rest = last.partition("<ANSWER>")
    last = f"{start}<answer>{words}</answer>{rest.partition('</answer>')[2]}"
    turns.append(Turn(ExternalAction(last, ()), last, None, None))
    trajectory = Trajectory(
        EpisodeId(0, "t", 0),
        "compat",
        TokenContext((1,)),
        tuple(turns),
        EpisodeStatus.ANSWERED,
        words.strip(),
    )
    return trajectory, sound, zooms


def test_the_compat_sum_pays_for_attempts_and_nothing_else() -> None:
    rng, config, seen = random.Random(0), RewardConfig(scorer="compat"), 0
    for (text, *effects), (one, other), zooms, fault in product(SPANS, PAIRS, range(5), (False, True)):
        trajectory, sound, tried = played(rng, zooms, filled(text, one, other), fault)
        right = one in {{"@": one, "#": other, "V": "V", "": None}[effect] for effect in effects}
        parts = score_episode(trajectory, Task("t", "v.mp4", "What? A. a B. b", one), config)
        found = (parts.accuracy, parts.format, parts.tool)
        assert found == (right, sound, right and tried > 0), trajectory.turns
        assert parts.total == pytest.approx(0.9 * right + 0.1 * sound + 0.5 * (right and tried > 0))
        seen += 1
    assert seen > 1000


# -- clean ----------------------------------------------------------------------

FORMS = [
    "@", "@.", "(@)", "@)", "Answer: @", "~", "(~)", "~.", r"\boxed{@}", r"$\boxed{@}$", r"\boxed{(@)}",
    r"\boxed{\text{@}}", "**@**", " @\n", "[@]", "The answer is @.", "The correct answer is (@).", "Option @",
    "@. option %", "(@) option %", "@: option %", "option %", "Option %.",
]  # fmt: skip
"""Ways to name an option that is written as `option %`; the released scorer fails most of them."""


@pytest.mark.parametrize("style", ["{}.", "({})", "{})", "{}:"])
@pytest.mark.parametrize("count", range(3, 11))
def test_clean_reads_every_form_of_every_letter_and_only_inside_the_span(count: int, style: str) -> None:
    letters = "ABCDEFGHIJ"[:count]
    asked = "What flashes?\n" + "\n".join(f"{style.format(c)} option {c * 2}" for c in letters)
    options = parse_options(asked)
    assert list(options) == list(letters)
    for form, letter in product(FORMS, letters):
        answer = filled(form, letter, "").replace("%", letter * 2)
        other = next(c for c in letters if c != letter)
        assert choice_correct(answer, letter, options) is True, answer
        assert choice_correct(answer, other, options) is False, answer
        inside = f"<think>It is {other}.</think><answer>{answer}</answer>"
        assert clean_accuracy(inside, answer, asked, letter) == 1
        assert clean_accuracy(f"<think>It is {answer}.</think>", None, asked, letter) == 0


def clean_accuracy(text: str, answer: str | None, asked: str, truth: str) -> float:
    """Accuracy of a one-turn episode under `clean`."""
    status = EpisodeStatus.NO_ANSWER if answer is None else EpisodeStatus.ANSWERED
    turns = (Turn(ExternalAction(text, ()), text, None, None),)
    trajectory = Trajectory(EpisodeId(0, "t", 0), "clean", TokenContext((1,)), turns, status, answer)
    return score_episode(trajectory, Task("t", "v.mp4", asked, truth), RewardConfig()).accuracy
