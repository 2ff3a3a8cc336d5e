"""Subtitles in both formats, and where they stand among frames."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vz_ray.video.errors import SubtitleError
from vz_ray.video.subtitles import Subtitle, between_frames, read_subtitles

SRT = """\ufeff1\r
00:00:01,500 --> 00:00:03,000\r
<i>Héllo</i> there,\r
{\\an8}second row\r
\r
2
00:01:00.000 --> 00:01:02.250 align:start
<font color="#fff">猫</font> <|image_pad|>

3
01:00:00,000 --> 01:00:01,000
<i></i>

"""


def test_srt_with_a_mark_at_its_beginning_both_line_ends_and_markup(tmp_path: Path) -> None:
    (tmp_path / "a.srt").write_text(SRT, encoding="utf-8", newline="")
    assert read_subtitles(tmp_path / "a.srt") == (
        Subtitle(1.5, 3.0, "Héllo there, second row"),
        Subtitle(60.0, 62.25, "猫"),
    )


def test_both_forms_of_longvideobench_and_a_clock_that_starts_later(tmp_path: Path) -> None:
    rows = [
        {"timestamp": [12.0, None], "text": "no end"},
        {"start": "00:00:10.500", "end": "00:00:11.500", "line": "first"},
        {"timestamp": [1.0, 2.0], "text": "before the video begins"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert read_subtitles(tmp_path / "a.json", offset_s=10.0) == (
        Subtitle(0.5, 1.5, "first"),
        Subtitle(2.0, 3.0, "no end"),
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.srt", "hello", "no line such as"),
        ("a.json", "{", "not JSON"),
        ("a.json", "{}", "expected a list of lines, found dict"),
        ("a.json", '[{"start": "00:00:01"}]', "line 0: expected start, end and line"),
        ("a.json", '[{"start": "soon", "end": "00:00:01", "line": "x"}]', "no time such as"),
    ],
)
def test_what_is_no_subtitles_is_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SubtitleError, match=said):
        read_subtitles(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SubtitleError, match=r"none\.srt: No such file"):
        read_subtitles(tmp_path / "none.srt")


def test_an_empty_file_has_no_lines(tmp_path: Path) -> None:
    (tmp_path / "a.srt").write_text("\n")
    assert read_subtitles(tmp_path / "a.srt") == ()


def test_a_line_stands_behind_the_frames_up_to_its_middle_and_only_where_a_frame_shows_it() -> None:
    early, short, unseen, late = (
        Subtitle(0.0, 5.0, "early"),
        Subtitle(9.9, 10.0, "short"),
        Subtitle(12.0, 18.0, "unseen"),
        Subtitle(29.0, 40.0, "late"),
    )
    placed = between_frames([early, short, unseen, late], [0.0, 10.0, 20.0, 30.0])
    assert placed == [[], [early, short], [], [], [late]]


def test_without_frames_nothing_is_shown() -> None:
    assert between_frames([Subtitle(0, 5, "x")], []) == [[]]
