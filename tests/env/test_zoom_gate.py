"""Zoom gate: entropies, decisions and calibration files, with a scripted policy."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.config import ConfigError, load_config
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.config.zoom_gate import ZoomGateConfig
from vz_ray.env.episode_runner import run_episode
from vz_ray.env.protocols import Prompt
from vz_ray.env.serialization import trajectory_from_dict, trajectory_to_dict
from vz_ray.env.task import AnswerType, Task
from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    SampledAction,
    SamplingParams,
    Trajectory,
    VersionSpan,
)
from vz_ray.env.zoom_gate import (
    DraftAnswer,
    forced_prefix,
    load_thresholds,
    option_entropy,
    option_letters,
    token_entropy,
)
from vz_ray.utils.errors import UserError
from vz_ray.video.local_source import LocalFrameSource

TASK = Task("t", "v.mp4", "What flashes? A. disc B. ring C. cross", "B")
FORCED = "<think></think><answer>"


class ConfidentPolicy:
    """Draft B with the given probability; answer C in a normal turn."""

    def __init__(self, chat_format, probability: float, draft: str = "B</answer>") -> None:
        self.chat_format, self.probability, self.text = chat_format, probability, draft
        self.forced: tuple[int, ...] = ()
        self.turns = 0

    async def generate(self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str) -> SampledAction:
        self.turns += 1
        ids = self.chat_format.encode_assistant("<think>x</think><answer>C</answer>")
        return SampledAction(ids, (-0.1,) * len(ids), (VersionSpan(0, len(ids), 0),), sampling_params, "end")

    async def draft_answer(
        self,
        prompt: Prompt,
        forced_token_ids: Sequence[int],
        logprob_token_ids: Sequence[int],
        *,
        max_tokens: int,
        request_id: str,
    ) -> DraftAnswer:
        self.forced = tuple(forced_token_ids)
        other = (1 - self.probability) / 2
        sampled = tuple(self.chat_format.tokenizer.encode(self.text, add_special_tokens=False))
        odds = [other, self.probability, other]
        row = {token: math.log(p) for token, p in zip(logprob_token_ids or (5, 6, 7), odds, strict=True)}
        return DraftAnswer(sampled, (row,) * len(sampled))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_video(tmp_path_factory.mktemp("videos"), VideoSpec("v.mp4", frames=100)))


async def run(video: str, chat_format, policy, gate: ZoomGateConfig, task: Task = TASK) -> Trajectory:
    config = EpisodeConfig(overview_frames=4, min_pixels=784, max_pixels=784, gate=gate)
    with LocalFrameSource() as frames:
        return await run_episode(
            replace(task, video=video),
            policy,
            frames,
            chat_format,
            config,
            episode_id=EpisodeId(0, "t", 0),
            sampling_params=SamplingParams(),
        )


async def test_certain_draft_becomes_the_answer(video, chat_format):
    policy = ConfidentPolicy(chat_format, 0.98)
    trajectory = await run(video, chat_format, policy, ZoomGateConfig("on", threshold=0.3))
    assert (trajectory.status, trajectory.answer, policy.turns) == (EpisodeStatus.ANSWERED, "B", 0)
    sampled = chat_format.tokenizer.encode("B</answer>", add_special_tokens=False)
    assert trajectory.turns[0].action.token_ids == (*policy.forced, *sampled, chat_format.end_id)
    assert trajectory.turns[0].text == f"{FORCED}B</answer>"
    gate = trajectory.extra["gate"]
    assert (gate["zoom"], gate["kind"], gate["draft"], gate["threshold"]) == (False, "choice", "B", 0.3)
    assert trajectory_from_dict(json.loads(json.dumps(trajectory_to_dict(trajectory)))) == trajectory


@pytest.mark.parametrize("mode", ["on", "measure"])
async def test_uncertain_or_measured_draft_is_discarded(video, chat_format, mode):
    policy = ConfidentPolicy(chat_format, 0.5 if mode == "on" else 0.98)
    gate = ZoomGateConfig(mode, threshold=0.3 if mode == "on" else None)
    trajectory = await run(video, chat_format, policy, gate)
    ungated = await run(video, chat_format, ConfidentPolicy(chat_format, 0.5), ZoomGateConfig())
    assert (trajectory.answer, policy.turns) == ("C", 1)
    assert trajectory.expanded_ids == ungated.expanded_ids
    assert trajectory.loss_mask == ungated.loss_mask
    assert (trajectory.extra["gate"]["zoom"], trajectory.extra["gate"]["draft"]) == (True, "B")
    assert ungated.extra == {}


async def test_unfinished_draft_is_uncertain(video, chat_format):
    policy = ConfidentPolicy(chat_format, 0.999, draft="B")
    trajectory = await run(video, chat_format, policy, ZoomGateConfig("on", threshold=1.0))
    assert trajectory.answer == "C"
    assert trajectory.extra["gate"]["draft"] is None


async def test_free_answer_uses_token_entropy(video, chat_format):
    task = replace(TASK, question="How many flashes?", answer="2", answer_type=AnswerType.NUMBER)
    policy = ConfidentPolicy(chat_format, 0.98, draft="2</answer>")
    trajectory = await run(video, chat_format, policy, ZoomGateConfig("on", threshold=0.3), task)
    assert (trajectory.answer, trajectory.extra["gate"]["kind"]) == ("2", "free")


async def test_policy_without_logprobs_is_rejected(video, chat_format):
    class PolicyWithoutLogprobs:
        generate = ConfidentPolicy.generate

    with pytest.raises(UserError, match="PolicyWithoutLogprobs returns none"):
        await run(video, chat_format, PolicyWithoutLogprobs(), ZoomGateConfig("measure"))


def test_remaining_probability_counts_as_an_option():
    half = math.log(0.5)
    assert option_entropy([{1: half, 2: half}], (1, 2)) == pytest.approx(math.log(2) / math.log(3))
    third = math.log(1 / 3)
    assert option_entropy([{1: third, 2: third}], (1, 2)) == pytest.approx(1.0)
    assert option_entropy([{1: 0.0, 2: -50.0}], (1, 2)) == pytest.approx(0.0, abs=1e-9)
    assert option_entropy([], (1, 2)) == 1.0


def test_token_entropy_is_the_mean():
    certain, uncertain = {1: 0.0, 2: -60.0, 3: -60.0}, dict.fromkeys((1, 2, 3), math.log(1 / 4))
    assert token_entropy([certain, uncertain]) == pytest.approx(0.5)
    assert token_entropy([]) == 1.0


@pytest.mark.parametrize(
    ("question", "letters"),
    [
        ("What? A. disc B. ring", "AB"),
        ("What?\n(A) disc\n(B) ring\n(C) A. Smith", "ABC"),
        ("What?\nA. disc\nB. ring\nC. cross\nD. A cross", "ABCD"),
        ("Who is B. Smith?", ""),
        ("What?", ""),
    ],
)
def test_option_letters_are_found_in_the_question(question, letters):
    assert option_letters(replace(TASK, question=question)) == tuple(letters)


def test_open_ended_question_has_no_letters():
    assert option_letters(replace(TASK, answer_type=AnswerType.OPEN_ENDED)) == ()


def test_option_letters_have_distinct_tokens(chat_format):
    forced, options = forced_prefix(chat_format, FORCED, ("A", "B", "C"))
    assert len(set(options)) == 3
    for letter, option in zip("ABC", options, strict=True):
        token_ids = chat_format.tokenizer.encode(f"{FORCED}{letter}</answer>", add_special_tokens=False)
        assert tuple(token_ids[: len(forced) + 1]) == (*forced, option)


def test_invalid_calibration_file_is_rejected(tmp_path: Path):
    path = tmp_path / "gate.json"
    with pytest.raises(UserError, match=r"gate\.json is not a valid gate calibration .*calibrate-gate"):
        load_thresholds(str(path))
    path.write_text('{"version": 99, "kinds": {}}')
    with pytest.raises(UserError, match="version 99"):
        load_thresholds(str(path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "maybe"}, "must be one of off, measure, on"),
        ({"mode": "on"}, "set exactly one"),
        ({"mode": "on", "thresholds_file": "a", "threshold": 0.5}, "set exactly one"),
        ({"threshold": 2.0}, "must be between 0 and 1"),
        ({"draft_prefix": "Answer:"}, "must end with <answer>"),
        ({"max_draft_tokens": 0}, "max_draft_tokens is 0"),
    ],
)
def test_invalid_setting_is_rejected(values, message):
    with pytest.raises(ValueError, match=message):
        ZoomGateConfig(**values)


def test_training_rejects_the_gate():
    with pytest.raises(ConfigError, match=r"episode\.gate\.mode is 'measure'.*training requires 'off'"):
        load_config(GrpoRunConfig, "conf/laptop.yaml", ["episode.gate.mode=measure"])


@pytest.mark.parametrize(("value", "mode"), [("on", "on"), ("off", "off"), ('"on"', "on"), ("measure", "measure")])
def test_yaml_booleans_are_accepted_as_modes(value: str, mode: str) -> None:
    gate = load_config(ServeConfig, None, [f"episode.gate.mode={value}", "episode.gate.threshold=0.5"]).episode.gate
    assert gate.mode == mode
