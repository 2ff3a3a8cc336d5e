"""JSON view of an episode, compared with its trajectory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.report.viewer.run_factory import MODEL, LightEpisode, light_record
from vz_ray.data.episode_record import record_from_dict, record_to_dict
from vz_ray.env.trajectory import RejectedZoom, SampledAction
from vz_ray.monitoring import metric_names
from vz_ray.report.viewer.episode_row import EpisodeParseError
from vz_ray.report.viewer.episode_view import MAX_FRAMES, MAX_TEXT_CHARS, episode_view
from vz_ray.report.viewer.token_texts import find_tokenizer, token_texts
from vz_ray.report.viewer.viewer_session import ViewerSession
from vz_ray.utils.json_lines import read_complete_lines


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def test_view_has_every_turn_of_the_episode(made_run: Path, tokenizer: Tokenizer) -> None:
    refused = 0
    for line in read_complete_lines(made_run / "episodes" / "000003.jsonl"):
        trajectory, view = record_from_dict(line).trajectory, episode_view(line, tokenizer, None)
        assert view["chat_format"] == trajectory.chat_format
        assert view["overview"]["times"] == [ref.pts_s for ref in trajectory.prompt.frame_refs]
        for turn, turn_view in zip(trajectory.turns, view["turns"], strict=True):
            assert isinstance(turn.action, SampledAction)
            assert turn_view["text"] == {"text": turn.text, "length": len(turn.text)}
            assert turn_view["sampled"]["logprobs"] == list(turn.action.logprobs)
            assert "".join(turn_view["sampled"]["texts"]) == turn.text + "<|im_end|>"
            assert len(turn_view["sampled"]["texts"]) == len(turn.action.token_ids)
            assert turn_view["seconds"] == list(turn.seconds)
            if isinstance(turn.zoom, RejectedZoom):
                refused += 1
                requested = {"start": 9.0, "end": 4.0, "fps": 2.0, "requested_fps": None}
                assert turn_view["refused"] == {
                    "kind": "reversed",
                    "message": turn.zoom.message,
                    "requested": requested,
                }
                assert view["zoomed"][0] == {**requested, "turn": 1, "refused": turn.zoom.message}
            elif turn.zoom is not None and turn.observation is not None:
                assert turn_view["zoom"]["start"] == turn.zoom.start_s
                assert turn_view["frames"]["times"] == [ref.pts_s for ref in turn.observation.frame_refs]
    assert refused > 0


def test_mismatch_comes_from_the_step_metrics(made_run: Path, tmp_path: Path) -> None:
    session = ViewerSession(made_run, tmp_path / "index.sqlite")
    session.follower.catch_up()
    mismatch = {"mismatch/kl": 4.1e-10, "mismatch/logprob_abs_max": 3.2e-6}
    mismatches = {}
    for number in range(1, 55):
        view = session.episode(number)
        mismatches[view["stage"]] = view["mismatch"]
    assert mismatches == {"train": mismatch, "rl": {}}
    assert {metric_names.MISMATCH_KL, metric_names.MISMATCH_LOGPROB_MAX} == set(mismatch)
    session.close()


def test_invalid_metrics_only_hide_the_mismatch(run: Path, tmp_path: Path) -> None:
    (run / "metrics.jsonl").write_text("broken\n")
    session = ViewerSession(run, tmp_path / "index.sqlite")
    session.follower.catch_up()
    assert session.episode(1)["mismatch"] == {}
    session.close()


def test_tokens_of_another_model_have_no_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the border is shown", add_special_tokens=False).ids
    assert token_texts(tokenizer, ids, "the border is shown") is not None
    assert token_texts(tokenizer, ids, "something else was said") is None
    assert token_texts(None, ids, "the border is shown") is None


def test_split_characters_are_joined(tokenizer: Tokenizer) -> None:
    text = "naïve 🦓 日本"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    texts = token_texts(tokenizer, ids, tokenizer.decode(ids))
    assert texts is not None
    assert len(texts) == len(ids) > len(text.split())
    assert "".join(texts) == tokenizer.decode(ids)


def test_tokenizer_of_the_model_or_export_is_found(tmp_path: Path) -> None:
    content = (MODEL / "tokenizer.json").read_bytes()
    assert find_tokenizer("nowhere/model", tmp_path) is None
    (tmp_path / "models" / "rl").mkdir(parents=True)
    (tmp_path / "models" / "rl" / "tokenizer.json").write_bytes(content)
    assert find_tokenizer("nowhere/model", tmp_path) is not None
    assert find_tokenizer(str(MODEL), tmp_path / "elsewhere") is not None


def test_tokenizer_is_found_in_the_hugging_face_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hub" / "models--Org--Model" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("no tokenizer")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert find_tokenizer("Org/Model", tmp_path) is None
    (folder / "tokenizer.json").write_bytes((MODEL / "tokenizer.json").read_bytes())
    assert find_tokenizer("Org/Model", tmp_path) is not None


def light(**changes: object) -> dict[str, object]:
    line = json.loads(json.dumps(record_to_dict(light_record(1, LightEpisode(frames=4, tokens=4)))))
    line["task"].update(changes)
    return dict(line)


def test_long_text_is_cut_with_its_length() -> None:
    view = episode_view(light(question="x" * (MAX_TEXT_CHARS + 5)), None, None)
    assert len(view["task"]["question"]["text"]) == MAX_TEXT_CHARS
    assert view["task"]["question"]["length"] == MAX_TEXT_CHARS + 5


def test_many_frames_are_downsampled_evenly() -> None:
    line = json.loads(json.dumps(record_to_dict(light_record(1, LightEpisode(frames=1000, tokens=4)))))
    view = episode_view(line, None, None)["overview"]
    assert (view["count"], len(view["times"])) == (1000, MAX_FRAMES)
    gaps = {round((b - a) / 4) for a, b in zip(view["times"], view["times"][1:], strict=False)}
    assert gaps <= {3, 4}


def test_invalid_trajectory_raises() -> None:
    line = light()
    line["trajectory"]["turns"][0]["action"] = {"by": "nobody"}  # type: ignore[index]
    with pytest.raises(EpisodeParseError, match="invalid episode"):
        episode_view(line, None, None)
