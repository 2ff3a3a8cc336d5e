"""Subtitle formats and placement between frames."""

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


def test_srt_with_bom_mixed_line_ends_and_markup(tmp_path: Path) -> None:
    (tmp_path / "a.srt").write_text(SRT, encoding="utf-8", newline="")
    assert read_subtitles(tmp_path / "a.srt") == (
        Subtitle(1.5, 3.0, "Héllo there, second row"),
        Subtitle(60.0, 62.25, "猫"),
    )


def test_longvideobench_formats_with_offset(tmp_path: Path) -> None:
    rows = [
        {"timestamp": [12.0, None], "text": "no end"},
        {"start": "00:00:10.500", "end": "00:00:11.500", "line": "first"},
        {"timestamp": [1.0, 2.0], "text": "before the start of the video"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert read_subtitles(tmp_path / "a.json", offset_s=10.0) == (
        Subtitle(0.5, 1.5, "first"),
        Subtitle(2.0, 3.0, "no end"),
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.srt", "hello", "no line such as"),
        ("a.json", "{", "not JSON"),
        ("a.json", "{}", "expected a list of lines, got dict"),
        ("a.json", '[{"start": "00:00:01"}]', "line 0: expected start, end and line"),
        ("a.json", '[{"start": "soon", "end": "00:00:01", "line": "x"}]', "is not a time such as"),
    ],
)
def test_invalid_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SubtitleError, match=message):
        read_subtitles(tmp_path / name)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SubtitleError, match=r"missing\.srt: No such file"):
        read_subtitles(tmp_path / "missing.srt")


def test_empty_file_has_no_lines(tmp_path: Path) -> None:
    (tmp_path / "a.srt").write_text("\n")
    assert read_subtitles(tmp_path / "a.srt") == ()


def test_line_follows_the_frames_before_its_middle() -> None:
    early, short, between, late = (
        Subtitle(0.0, 5.0, "early"),
        Subtitle(9.9, 10.0, "short"),
        Subtitle(12.0, 18.0, "between"),
        Subtitle(29.0, 40.0, "late"),
    )
    placed = between_frames([early, short, between, late], [0.0, 10.0, 20.0, 30.0])
    assert placed == [[], [early, short], [], [], [late]]


def test_no_frames_means_no_lines() -> None:
    assert between_frames([Subtitle(0, 5, "x")], []) == [[]]
