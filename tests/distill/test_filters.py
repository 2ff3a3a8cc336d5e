"""Episode filters, decontamination, curation and the data card."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.distill.episode_records import LAST_ROUND, REJECTED, make_record
from vz_ray.config.distill import FilterConfig
from vz_ray.distill.cost_ledger import CostSummary
from vz_ray.distill.dataset import build_data_card, to_markdown, to_table
from vz_ray.distill.decontamination import (
    HeldOutSets,
    VideoIdentity,
    identify_video,
    normalize_words,
    word_ngrams,
)
from vz_ray.distill.filters import (
    balance,
    compute_pass_rates,
    curate,
    decontaminate,
    deduplicate,
    filter_by_pass_rate,
    find_fault,
    limit_per_task,
    max_per_kind,
    split_episodes,
)
from vz_ray.distill.zoom_patterns import ZoomPattern, classify_pattern
from vz_ray.env.trajectory import EpisodeStatus
from vz_ray.video.frame import ZoomRequest

DEFAULTS = FilterConfig()
ZOOM, INSIDE, DISJOINT = ZoomRequest(0, 8, 2), ZoomRequest(2, 4, 4), ZoomRequest(20, 24, 2)
NO_HELD_OUT = HeldOutSets([], [], 5)


def reasons(dropped):
    return dict(Counter(episode.reason for episode in dropped))


@pytest.mark.parametrize(
    ("episode", "fault"),
    [
        (make_record(ZOOM), ""),
        (make_record(ZOOM, REJECTED, INSIDE), "bad format"),
        (make_record(ZOOM, last_turn="<answer>B</answer>"), "bad format"),
        (make_record(ZOOM, last_turn="<think>an <image></think><answer>B</answer>"), "text contains <image>"),
        (make_record(), "did not zoom"),
        (make_record(ZOOM, correct=False), "wrong answer"),
        (make_record(ZOOM, valid=False), "not scored"),
        (make_record(ZOOM, status=EpisodeStatus.TRUNCATED), "truncated"),
        (make_record(ZOOM, LAST_ROUND, status=EpisodeStatus.NO_ANSWER), "zoomed until the last round"),
        (make_record(ZOOM, status=EpisodeStatus.NO_ANSWER, last_turn="hm"), "no answer"),
        (make_record(status=EpisodeStatus.FAILED, error="teacher timeout: 5 s"), "failed: teacher timeout"),
        # Prefix turns do not count.
        (make_record(REJECTED, ZOOM, prefix_turns=1), ""),
        (make_record(ZOOM, prefix_turns=1), "did not zoom"),
    ],
)
def test_find_fault_returns_reason(episode, fault):
    assert find_fault(episode, DEFAULTS, 16) == fault


def test_format_and_zoom_checks_are_optional():
    free = replace(DEFAULTS, require_format=False, require_zoom=False)
    assert find_fault(make_record(last_turn="<answer>B</answer>"), free, 16) == ""


def test_filter_by_pass_rate_keeps_range():
    attempts = [make_record(ZOOM, task=task, sample=i, correct=i < right) for task, right in
                (("none", 0), ("one", 1), ("three", 3), ("all", 4)) for i in range(4)]  # fmt: skip
    attempts += [
        make_record(task="one", sample=4, status=EpisodeStatus.FAILED),
        make_record(ZOOM, task="one", sample=5, valid=False),
    ]
    rates = compute_pass_rates(attempts)
    assert rates == {"none": 0.0, "one": 0.25, "three": 0.75, "all": 1.0}
    right, _ = split_episodes(attempts, lambda record: find_fault(record, DEFAULTS, 16))
    kept, dropped = filter_by_pass_rate(right, rates, replace(DEFAULTS, min_pass_rate=0.5, max_pass_rate=0.9))
    assert [r.task.task_id for r in kept] == ["three"] * 3
    assert reasons(dropped) == {"task too hard": 1, "task too easy": 4}


def test_limit_per_task_prefers_different_patterns():
    direct = [make_record(ZOOM, sample=i) for i in range(3)]
    progressive = make_record(ZOOM, INSIDE, sample=3)
    kept, dropped = limit_per_task([*direct, progressive], 2)
    assert [r.trajectory.id.sample for r in kept] == [0, 3]
    assert reasons(dropped) == {"task limit": 2}


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
def test_videos_match_by_content_then_name(video, held, same):
    assert HeldOutSets([VideoIdentity(*held)], [], 5).has_video(VideoIdentity(*video)) is same


def test_identity_hashes_local_files(tmp_path):
    one, copy = tmp_path / "a.mp4", tmp_path / "B.mp4"
    one.write_bytes(b"x" * 100)
    copy.write_bytes(b"x" * 100)
    assert identify_video(str(one)).content_hash == identify_video(str(copy)).content_hash != ""
    assert identify_video(str(copy)).name == "b"
    assert identify_video(str(tmp_path / "missing" / "Talk.MP4")) == VideoIdentity("", "talk")
    assert identify_video("https://host/x/Talk.mp4?key=1") == VideoIdentity("", "talk")


def test_words_are_normalized():
    assert normalize_words("What’s  SHOWN, ﬁrst?\n(A) Ä") == ("what", "s", "shown", "first", "a", "ä")
    assert normalize_words("A\u0308") == normalize_words("Ä")
    assert word_ngrams(("a", "b", "c"), 2) == {("a", "b"), ("b", "c")}
    assert word_ngrams(("a",), 5) == {("a",)}
    assert word_ngrams((), 5) == frozenset()


LONG = "Which of the two dogs is the first to reach the gate after the whistle has been blown twice?"


def test_held_out_videos_and_questions_are_dropped():
    held_out = HeldOutSets([VideoIdentity("blake3:seen", "x")], [LONG], 5)
    episodes = [
        make_record(task="a"),
        make_record(task="b", content_hash="blake3:seen"),
        make_record(task="c", question=LONG.upper().replace("?", " !")),
        make_record(task="d", question=LONG.replace("twice", "once")),
        make_record(task="e", question=f"In this video: {LONG}"),
        make_record(task="f", question="Which of the two dogs is larger, and what does it do at the gate?"),
    ]
    kept, dropped = decontaminate(episodes, held_out, 0.8)
    assert [r.task.task_id for r in kept] == ["a", "f"]
    assert reasons(dropped) == {
        "held-out video": 1,
        "held-out question": 1,
        "near-duplicate of a held-out question": 2,
    }
    kept, _ = decontaminate(episodes, held_out, 0)
    assert [r.task.task_id for r in kept] == ["a", "c", "d", "e", "f"]


def test_overlap_counts_one_held_out_question():
    halves = HeldOutSets([], [LONG[:45], LONG[45:]], 3)
    assert 0.3 < halves.max_overlap(LONG) < 0.7


def test_duplicates_are_dropped():
    episodes = [
        make_record(ZOOM, task="a", sample=0, question="What?"),
        make_record(ZOOM, task="a", sample=1, question="What?"),
        make_record(ZOOM, task="a", sample=2, question="What?", think="0"),
        make_record(ZOOM, task="b", sample=0, question="what ?"),
        make_record(ZOOM, task="b2", sample=0, question="what ?", video="other.mp4"),
    ]
    kept, dropped = deduplicate(episodes)
    assert [(r.task.task_id, r.trajectory.id.sample) for r in kept] == [("a", 0), ("a", 1), ("b2", 0)]
    assert reasons(dropped) == {"duplicate transcript": 1, "duplicate question": 1}


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.floats(0.05, 1.0))
def test_max_per_kind_is_largest_valid_cap(counts, share):
    cap = max_per_kind(counts, share)
    allowed = max(share, 1 / len(counts))
    kept = [min(count, cap) for count in counts]
    assert cap >= 1
    assert max(kept) <= allowed * sum(kept) + 1e-6 or cap == min(counts)
    if cap < max(counts):
        more = [min(count, cap + 1) for count in counts]
        assert max(more) > allowed * sum(more)


def test_balance_is_deterministic_per_seed():
    episodes = [make_record(ZOOM, task=f"d{i}") for i in range(40)]
    episodes += [make_record(ZOOM, INSIDE, task=f"p{i}") for i in range(10)]
    episodes += [make_record(ZOOM, DISJOINT, task=f"c{i}") for i in range(10)]

    def kept(seed):
        balanced, dropped = balance(episodes, lambda r: classify_pattern(r.trajectory), 0.5, seed=seed, reason="enough")
        assert len(balanced) + len(dropped) == len(episodes)
        return [r.task.task_id for r in balanced]

    assert kept(0) == kept(0) != kept(1)
    assert Counter(name[0] for name in kept(0)) == {"d": 20, "p": 10, "c": 10}


def test_curation_accounts_for_every_episode():
    episodes = [make_record(ZOOM, task=f"d{i}", source="one") for i in range(6)]
    episodes += [make_record(ZOOM, INSIDE, task=f"p{i}", source="two") for i in range(2)]
    episodes += [
        make_record(ZOOM, task="w", correct=False),
        make_record(task="f", status=EpisodeStatus.FAILED, error="teacher x: y"),
    ]
    curated = curate(episodes, replace(DEFAULTS, max_pattern_share=0.6), NO_HELD_OUT, max_zoom_frames=16, seed=0)
    assert len(curated.kept) + len(curated.dropped) == len(episodes)
    assert len({episode.episode_id for episode in curated.dropped}) == len(curated.dropped)
    card = build_data_card(
        "t",
        "teacher",
        episodes,
        curated,
        CostSummary(cost_usd=1.5, requests=3),
        planned=12,
        inputs={"tasks": 10},
        held_out=["eval.json"],
    )
    assert card.patterns == {"direct hit": 3, "progressive": 2}
    assert card.turns == {"2": 3, "3": 2}
    assert card.sources == {"one": 3, "two": 2}
    assert card.dropped == {"pattern limit": 3, "failed: teacher x": 1, "wrong answer": 1}
    assert card.pass_rates == {"none": 1, "all": 8}
    assert json.loads(json.dumps(asdict(card)))["cost"]["cost_usd"] == 1.5
    page = to_markdown(card)
    assert "| wrong answer | 1 |" in page
    assert "| direct hit | 3 |" in page
    assert to_table(card).row_count > 12
    with pytest.raises(ValueError, match=r"num_episodes is 10; it must be kept \(5\) plus dropped \(4\)"):
        build_data_card(
            "t",
            "e",
            episodes,
            replace(curated, dropped=curated.dropped[1:]),
            CostSummary(),
            planned=0,
            inputs={},
            held_out=[],
        )


def test_pattern_names():
    assert {str(p) for p in ZoomPattern} == {"no zoom", "direct hit", "progressive", "self-correction"}
