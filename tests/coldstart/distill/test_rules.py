"""Each rule keeps what it should, says why it drops the rest, and loses nothing."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.coldstart.distill.making import LAST, REFUSED, record
from vz_ray.coldstart.distill.account import Spent
from vz_ray.coldstart.distill.balance import balance, cap_of
from vz_ray.coldstart.distill.card import make_card, markdown, table
from vz_ray.coldstart.distill.curate import curate
from vz_ray.coldstart.distill.decontaminate import (
    HeldOut,
    VideoIdentity,
    decontaminate,
    deduplicate,
    identity,
    ngrams_of,
    words_of,
)
from vz_ray.coldstart.distill.patterns import Pattern, pattern_of
from vz_ray.coldstart.distill.select import (
    by_pass_rate,
    fault_of,
    most_per_task,
    pass_rates,
    without_faults,
)
from vz_ray.config.distill import CurateConfig
from vz_ray.episode.trajectory import Status
from vz_ray.video.frame import Zoom

ALL = CurateConfig()
ZOOM, INSIDE, FAR = Zoom(0, 8, 2), Zoom(2, 4, 4), Zoom(20, 24, 2)
NOBODY = HeldOut([], [], 5)


def reasons(dropped):
    return dict(Counter(one.reason for one in dropped))


@pytest.mark.parametrize(
    ("episode", "fault"),
    [
        (record(ZOOM), ""),
        (record(ZOOM, REFUSED, INSIDE), "bad format"),
        (record(ZOOM, last="<answer>B</answer>"), "bad format"),
        (record(ZOOM, last="<think>an <image></think><answer>B</answer>"), "a text with <image>"),
        (record(), "did not zoom"),
        (record(ZOOM, right=False), "wrong answer"),
        (record(ZOOM, valid=False), "not judged"),
        (record(ZOOM, status=Status.TRUNCATED), "out of room"),
        (record(ZOOM, LAST, status=Status.NO_ANSWER), "never stopped zooming"),
        (record(ZOOM, status=Status.NO_ANSWER, last="hm"), "no answer"),
        (record(status=Status.FAILED, error="expert timeout: 5 s"), "failed: expert timeout"),
        # What the policy did before is not the expert's.
        (record(REFUSED, ZOOM, given=1), ""),
        (record(ZOOM, given=1), "did not zoom"),
    ],
)
def test_what_is_wrong_with_an_episode(episode, fault):
    assert fault_of(episode, ALL, 16) == fault


def test_format_and_zooms_can_be_left_free():
    free = replace(ALL, formatted=False, zoomed=False)
    assert fault_of(record(last="<answer>B</answer>"), free, 16) == ""


def test_tasks_are_kept_between_the_pass_rates():
    attempts = [record(ZOOM, task=task, sample=i, right=i < right) for task, right in
                (("none", 0), ("one", 1), ("three", 3), ("all", 4)) for i in range(4)]  # fmt: skip
    attempts += [
        record(task="one", sample=4, status=Status.FAILED),
        record(ZOOM, task="one", sample=5, valid=False),
    ]
    rates = pass_rates(attempts)
    assert rates == {"none": 0.0, "one": 0.25, "three": 0.75, "all": 1.0}
    right, _ = without_faults(attempts, ALL, 16)
    kept, dropped = by_pass_rate(right, rates, replace(ALL, min_pass=0.5, max_pass=0.9))
    assert [r.task.task_id for r in kept] == ["three"] * 3
    assert reasons(dropped) == {"task too hard": 1, "task too easy": 4}


def test_of_a_task_as_many_patterns_are_kept_as_it_has():
    direct = [record(ZOOM, sample=i) for i in range(3)]
    progressive = record(ZOOM, INSIDE, sample=3)
    kept, dropped = most_per_task([*direct, progressive], 2)
    assert [r.trajectory.id.sample for r in kept] == [0, 3]
    assert reasons(dropped) == {"enough of the task": 2}


@pytest.mark.parametrize(
    ("video", "held", "same"),
    [
        (("blake3:a", "v"), ("blake3:a", "w"), True),
        (("blake3:a", "v"), ("blake3:b", "v"), False),
        (("blake3:a", "v"), ("", "v"), True),
        (("", "v"), ("blake3:b", "v"), True),
        (("", "v"), ("", "w"), False),
    ],
    ids=["a copy", "same name, both read", "theirs missing", "ours missing", "both missing"],
)
def test_videos_are_told_apart_by_content_else_by_name(video, held, same):
    assert HeldOut([VideoIdentity(*held)], [], 5).has_video(VideoIdentity(*video)) is same


def test_identity_is_the_content_where_there_is_a_file(tmp_path):
    one, copy = tmp_path / "a.mp4", tmp_path / "B.mp4"
    one.write_bytes(b"x" * 100)
    copy.write_bytes(b"x" * 100)
    assert identity(str(one)).content == identity(str(copy)).content != ""
    assert identity(str(copy)).name == "b"
    assert identity(str(tmp_path / "gone" / "Talk.MP4")) == VideoIdentity("", "talk")
    assert identity("https://host/x/Talk.mp4?key=1") == VideoIdentity("", "talk")


def test_words_have_no_case_no_punctuation_and_one_form():
    assert words_of("What’s  SHOWN, ﬁrst?\n(A) Ä") == ("what", "s", "shown", "first", "a", "ä")
    assert words_of("A\u0308") == words_of("Ä")
    assert ngrams_of(("a", "b", "c"), 2) == {("a", "b"), ("b", "c")}
    assert ngrams_of(("a",), 5) == {("a",)}
    assert ngrams_of((), 5) == frozenset()


LONG = "Which of the two dogs is the first to reach the gate after the whistle has been blown twice?"


def test_episodes_on_videos_or_questions_of_an_evaluation_set_are_dropped():
    held_out = HeldOut([VideoIdentity("blake3:seen", "x")], [LONG], 5)
    episodes = [
        record(task="a"),
        record(task="b", content="blake3:seen"),
        record(task="c", question=LONG.upper().replace("?", " !")),
        record(task="d", question=LONG.replace("twice", "once")),
        record(task="e", question=f"In this video: {LONG}"),
        record(task="f", question="Which of the two dogs is larger, and what does it do at the gate?"),
    ]
    kept, dropped = decontaminate(episodes, held_out, 0.8)
    assert [r.task.task_id for r in kept] == ["a", "f"]
    assert reasons(dropped) == {
        "video of an evaluation set": 1,
        "question of an evaluation set": 1,
        "nearly a question of an evaluation set": 2,
    }
    kept, _ = decontaminate(episodes, held_out, 0)
    assert [r.task.task_id for r in kept] == ["a", "c", "d", "e", "f"]


def test_questions_are_near_by_one_held_out_question_not_by_many_together():
    halves = HeldOut([], [LONG[:45], LONG[45:]], 3)
    assert 0.3 < halves.overlap(LONG) < 0.7


def test_the_same_question_under_another_name_and_the_same_words_are_dropped():
    episodes = [
        record(ZOOM, task="a", sample=0, question="What?"),
        record(ZOOM, task="a", sample=1, question="What?"),
        record(ZOOM, task="a", sample=2, question="What?", think="0"),
        record(ZOOM, task="b", sample=0, question="what ?"),
        record(ZOOM, task="b2", sample=0, question="what ?", video="other.mp4"),
    ]
    kept, dropped = deduplicate(episodes)
    assert [(r.task.task_id, r.trajectory.id.sample) for r in kept] == [("a", 0), ("a", 1), ("b2", 0)]
    assert reasons(dropped) == {"same transcript": 1, "same question in another task": 1}


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.floats(0.05, 1.0))
def test_no_kind_has_more_than_its_share_and_no_more_are_dropped_than_needed(counts, share):
    cap = cap_of(counts, share)
    allowed = max(share, 1 / len(counts))
    kept = [min(count, cap) for count in counts]
    assert cap >= 1
    assert max(kept) <= allowed * sum(kept) + 1e-6 or cap == min(counts)
    if cap < max(counts):
        more = [min(count, cap + 1) for count in counts]
        assert max(more) > allowed * sum(more)


def test_balance_is_a_draw_that_can_be_repeated():
    many = [record(ZOOM, task=f"d{i}") for i in range(40)]
    many += [record(ZOOM, INSIDE, task=f"p{i}") for i in range(10)]
    many += [record(ZOOM, FAR, task=f"c{i}") for i in range(10)]

    def kept(seed):
        found, dropped = balance(many, lambda r: pattern_of(r.trajectory), 0.5, seed=seed, reason="enough")
        assert len(found) + len(dropped) == len(many)
        return [r.task.task_id for r in found]

    assert kept(0) == kept(0) != kept(1)
    assert Counter(name[0] for name in kept(0)) == {"d": 20, "p": 10, "c": 10}


def test_everything_that_comes_in_is_kept_or_dropped_with_a_reason_and_the_card_adds_up():
    episodes = [record(ZOOM, task=f"d{i}", source="one") for i in range(6)]
    episodes += [record(ZOOM, INSIDE, task=f"p{i}", source="two") for i in range(2)]
    episodes += [
        record(ZOOM, task="w", right=False),
        record(task="f", status=Status.FAILED, error="expert x: y"),
    ]
    curated = curate(
        episodes, replace(ALL, most_of_pattern=0.6), NOBODY, max_zoom_frames=16, seed=0
    )  # fmt: skip
    assert len(curated.kept) + len(curated.dropped) == len(episodes)
    assert len({one.name for one in curated.dropped}) == len(curated.dropped)
    card = make_card(
        "t", "expert", episodes, curated.kept, curated.dropped, Spent(usd=1.5, requests=3), planned=12,
        rates=curated.rates, came_in={"tasks": 10}, against=["eval.json"],
    )  # fmt: skip
    assert card.patterns == {"direct hit": 3, "progressive": 2}
    assert card.turns == {"2": 3, "3": 2}
    assert card.sources == {"one": 3, "two": 2}
    assert card.dropped == {"enough of the pattern": 3, "failed: expert x": 1, "wrong answer": 1}
    assert card.pass_rates == {"none": 1, "all": 8}
    assert json.loads(json.dumps(card.json))["cost"]["usd"] == 1.5
    page = markdown(card)
    assert "| wrong answer | 1 |" in page
    assert "| direct hit | 3 |" in page
    assert table(card).row_count > 12
    with pytest.raises(ValueError, match="10 episodes were played, 5 kept and 4 dropped"):
        make_card(
            "t", "e", episodes, curated.kept, curated.dropped[1:], Spent(), planned=0, rates={}, came_in={},
            against=[],
        )  # fmt: skip


def test_every_pattern_has_a_name():
    assert {str(p) for p in Pattern} == {"no zoom", "direct hit", "progressive", "self-correction"}
