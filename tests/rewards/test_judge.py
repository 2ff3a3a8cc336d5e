"""Judges, against a real HTTP server: every verdict is one that was given, or the sample is invalid."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.rewards.fake_endpoint import FakeReply, ReplyScript, serve_endpoint
from tests.rewards.test_scorer import GOOD, TASK, make_trajectory
from vz_ray.config.reward import JudgeConfig, RewardConfig
from vz_ray.env.task import AnswerType, CaptionQuestion
from vz_ray.env.trajectory import JUDGE_FAILED_NOTE
from vz_ray.rewards import check_scorers, score_episode
from vz_ray.rewards import judge as judge_module
from vz_ray.rewards.judge import Judge, JudgeError, get_judge
from vz_ray.rewards.judge_protocol import JudgeForm, JudgeVerdict
from vz_ray.utils.errors import UserError

OPEN = replace(TASK, question="What runs?", answer="a dog", answer_type=AnswerType.OPEN_ENDED)
GRADED = replace(OPEN, answer_type=AnswerType.GRADED)
ASK = (JudgeForm.BINARY, "What runs?", "a dog", "the dog")


@pytest.fixture(autouse=True)
def own_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """No judge outlives its test's server."""
    monkeypatch.setattr(judge_module, "_JUDGES", {})


@pytest.fixture
def config(tmp_path: Path) -> JudgeConfig:
    return JudgeConfig(
        model="judge", base_url="http://127.0.0.1:9/v1", cache_dir=str(tmp_path / "verdicts"),
        max_attempts=4, backoff_s=0.02, request_timeout_s=20, total_timeout_s=60,
    )  # fmt: skip


def always(text: str | None = "1", **more: Any) -> ReplyScript:
    return lambda number, body: FakeReply(text, **more)


def refused(judge: Judge, reason: str) -> JudgeError:
    with pytest.raises(JudgeError) as caught:
        judge.judge_answer(*ASK)
    assert caught.value.reason == reason
    return caught.value


@pytest.mark.parametrize(("reply", "accuracy"), [("1", 1.0), ("0", 0.0), ("Verdict: 1", 1.0)])
def test_an_open_ended_answer_is_as_right_as_the_judge_says(
    config: JudgeConfig, reply: str, accuracy: float
) -> None:
    with serve_endpoint(always(reply)) as endpoint:
        reward = RewardConfig(judge=replace(config, base_url=endpoint.url))
        parts = score_episode(make_trajectory("the dog", GOOD), OPEN, reward)
    assert parts.valid
    assert (parts.accuracy, parts.tool, parts.extra) == (accuracy, accuracy, {})
    (asked,) = endpoint.requests
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("judge", 0.0, 512)
    said = asked["messages"][-1]["content"]
    assert [word in said for word in ("What runs?", "a dog", "<answer>the dog</answer>")] == [True] * 3


@pytest.mark.parametrize(("reply", "accuracy", "grade"), [("yes", 1.0, 4), ("no", 0.0, 1)])
def test_a_graded_answer_has_the_judges_score_beside_its_accuracy(
    config: JudgeConfig, reply: str, accuracy: float, grade: int
) -> None:
    with serve_endpoint(always(f"{{'pred': '{reply}', 'score': {grade}}}")) as endpoint:
        parts = score_episode(
            make_trajectory("the dog"), GRADED, RewardConfig(judge=replace(config, base_url=endpoint.url))
        )
    assert (parts.valid, parts.accuracy, parts.extra) == (True, accuracy, {"judge_score": float(grade)})


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (always("I would say so."), "judge nonsense"),
        (always(""), "judge nonsense"),
        (always(None), "judge nonsense"),
        (always(body=b"<html>gateway</html>", headers={"content-type": "text/html"}), "judge nonsense"),
        (always(body=b'{"choices": []}'), "judge nonsense"),
        (always(body=b"[1]"), "judge nonsense"),
        (always(body=b"{", status=200), "judge nonsense"),
        (always(status=500, body=b"{}"), "judge status 500"),
        (always(status=429, body=b"{}"), "judge status 429"),
        (always(status=401, body=b'{"error": {"message": "bad key"}}'), "judge status 401"),
        (always(hang_up=True), "judge connection"),
    ],
)
def test_what_is_no_verdict_makes_the_sample_invalid_and_is_counted_by_its_reason(
    config: JudgeConfig, script: ReplyScript, reason: str
) -> None:
    with serve_endpoint(script) as endpoint:
        parts = score_episode(
            make_trajectory("the dog", GOOD), OPEN, RewardConfig(judge=replace(config, base_url=endpoint.url))
        )
    assert (parts.valid, parts.total, parts.accuracy) == (False, 0.0, 0.0)
    assert parts.reason == reason
    assert parts.judge_failed
    assert parts.reason.startswith(JUDGE_FAILED_NOTE)
    again = reason in ("judge status 500", "judge status 429", "judge connection")
    assert len(endpoint.requests) == (config.max_attempts if again else 1)


def test_a_busy_server_is_asked_again_later(config: JudgeConfig) -> None:
    replies = [
        FakeReply(status=429, headers={"retry-after": "0.4"}, body=b"{}"),
        FakeReply(status=503, body=b"{}"),
    ]
    with serve_endpoint(lambda number, body: (*replies, FakeReply("1"))[number]) as endpoint:
        judge = Judge(replace(config, base_url=endpoint.url, backoff_s=0.1))
        assert judge.judge_answer(*ASK) == JudgeVerdict(True)
        judge.close()
    assert len(endpoint.requests) == 3
    assert endpoint.request_times_s[1] - endpoint.request_times_s[0] >= 0.4
    assert (
        endpoint.request_times_s[2] - endpoint.request_times_s[1] >= 0.1
    )  # at least half of the doubled wait


def test_nobody_listening_is_a_lost_connection(config: JudgeConfig) -> None:
    error = refused(Judge(config), "connection")
    assert "127.0.0.1:9" in str(error)


def test_a_request_that_takes_too_long_is_tried_again(config: JudgeConfig) -> None:
    with serve_endpoint(lambda number, body: FakeReply("1", delay_s=0 if number else 30)) as endpoint:
        judge = Judge(replace(config, base_url=endpoint.url, request_timeout_s=3))
        assert judge.judge_answer(*ASK) == JudgeVerdict(True)
        judge.close()
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize("script", [always("1", after_s=30), always("1", trickle_s=0.2)])
def test_a_verdict_has_a_deadline_whatever_the_server_does(config: JudgeConfig, script: ReplyScript) -> None:
    """A reply that trickles keeps every read short; only a limit on the whole ends it."""
    with serve_endpoint(script) as endpoint:
        judge = Judge(replace(config, base_url=endpoint.url, request_timeout_s=20, total_timeout_s=1.0))
        began = time.monotonic()
        refused(judge, "timeout")
        assert time.monotonic() - began < 15
        judge.close()


def test_no_attempt_is_waited_for_that_the_deadline_forbids(config: JudgeConfig) -> None:
    with serve_endpoint(always(status=429, headers={"retry-after": "50"}, body=b"{}")) as endpoint:
        judge = Judge(replace(config, base_url=endpoint.url, total_timeout_s=20))
        began = time.monotonic()
        refused(judge, "status 429")
        assert time.monotonic() - began < 15
        judge.close()
    assert len(endpoint.requests) == 1


def test_never_more_requests_at_once_than_allowed(config: JudgeConfig) -> None:
    with serve_endpoint(always("1", after_s=0.05)) as endpoint:
        judge = Judge(replace(config, base_url=endpoint.url, max_concurrency=3))
        with ThreadPoolExecutor(24) as pool:
            answers = [f"dog {i}" for i in range(24)]
            found = list(
                pool.map(lambda a: judge.judge_answer(JudgeForm.BINARY, "What?", "a dog", a), answers)
            )
        judge.close()
    assert found == [JudgeVerdict(True)] * 24
    assert len(endpoint.requests) == 24
    assert endpoint.max_concurrent == 3


def test_the_same_question_at_the_same_time_is_asked_once(config: JudgeConfig) -> None:
    """Samples of a group often give the same answer."""
    with serve_endpoint(always("0", after_s=0.3)) as endpoint:
        judge = Judge(replace(config, base_url=endpoint.url, use_cache=False))
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: judge.judge_answer(*ASK), range(8)))
        assert found == [JudgeVerdict(False)] * 8
        assert len(endpoint.requests) == 1
        judge.judge_answer(*ASK)
        assert len(endpoint.requests) == 2, "without a disk cache, a later question is asked anew"
        judge.close()


def test_a_verdict_on_disk_is_not_asked_for_again_by_any_process(config: JudgeConfig) -> None:
    with serve_endpoint(always("1")) as endpoint:
        shared = replace(config, base_url=endpoint.url)
        first = Judge(shared)
        assert first.judge_answer(*ASK) == JudgeVerdict(True)
        first.close()
        program = (
            "import sys, json\n"
            "from vz_ray.config.reward import JudgeConfig\n"
            "from vz_ray.rewards.judge import *\n"
            "judge = Judge(JudgeConfig(**json.loads(sys.argv[1])))\n"
            "print(judge.verdict(Form.BINARY, *sys.argv[2:]), 'openai' in sys.modules)\n"
        )
        settings = json.dumps(vars(shared))
        done = subprocess.run(
            [sys.executable, "-c", program, settings, *ASK[1:]], capture_output=True, text=True, timeout=120
        )
    assert done.stdout == "Verdict(right=True, score=None) False\n", done.stderr
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"model": "another"},
        {"parameters": {"temperature": 1.0}},
        {"prompt": "{tmp}/judge.yaml"},
        {"question": "Who?"},
        {"truth": "a cat"},
        {"answer": "a cat"},
        {"form": JudgeForm.GRADED},
    ],
)
def test_whatever_decides_a_verdict_names_it(
    config: JudgeConfig, change: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "judge.yaml").write_text("system: Be strict.\nuser: '{question} {truth} {answer}'\n")
    graded = "{'pred': 'no', 'score': 2}"
    with serve_endpoint(
        lambda number, body: FakeReply(graded if "dictionary" in str(body) else "1")
    ) as endpoint:
        shared = replace(config, base_url=endpoint.url)
        Judge(shared).judge_answer(*ASK)
        asked = dict(zip(("form", "question", "truth", "answer"), ASK, strict=True))
        settings = {
            key: value.format(tmp=tmp_path) if isinstance(value, str) else value
            for key, value in change.items()
            if key not in asked
        }
        Judge(replace(shared, **settings)).judge_answer(
            **asked | {k: v for k, v in change.items() if k in asked}
        )
    assert len(endpoint.requests) == 2


def test_nonsense_and_failures_are_not_kept(config: JudgeConfig) -> None:
    with serve_endpoint(lambda number, body: FakeReply(("perhaps", "1")[number])) as endpoint:
        judge = Judge(replace(config, base_url=endpoint.url))
        refused(judge, "nonsense")
        assert judge.judge_answer(*ASK) == JudgeVerdict(True)
        judge.close()


def test_a_damaged_entry_is_asked_for_again_and_mended(config: JudgeConfig) -> None:
    with serve_endpoint(always("1")) as endpoint:
        judge = Judge(replace(config, base_url=endpoint.url))
        judge.judge_answer(*ASK)
        (entry,) = Path(config.cache_dir).rglob("*.json")
        for damage in (b"", b"{", b"[]", b'{"reply": "perhaps"}', b'{"reply": 1}'):
            entry.write_bytes(damage)
            assert judge.judge_answer(*ASK) == JudgeVerdict(True)
        judge.judge_answer(*ASK)
        judge.close()
    assert len(endpoint.requests) == 6


def test_a_cache_that_cannot_be_written_costs_no_verdict(config: JudgeConfig, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with serve_endpoint(always("1")) as endpoint:
        judge = Judge(replace(config, base_url=endpoint.url, cache_dir=str(blocked)))
        assert judge.judge_answer(*ASK) == JudgeVerdict(True)
        judge.close()


def test_nothing_is_asked_or_needed_for_answers_that_need_no_judge(config: JudgeConfig) -> None:
    """Multiple choice, numbers, and open-ended questions without an answer: no client, no key, no request."""
    with serve_endpoint(always("1")) as endpoint:
        keyed = replace(config, base_url=endpoint.url, api_key_env="VZ_RAY_NO_SUCH_KEY")
        reward = RewardConfig(judge=keyed)
        number = replace(TASK, answer="3", answer_type=AnswerType.NUMBER)
        assert score_episode(make_trajectory("B", GOOD), TASK, reward).total == 1.5
        assert score_episode(make_trajectory("three"), number, reward).accuracy == 1
        assert score_episode(make_trajectory(None), OPEN, reward).accuracy == 0
        assert score_episode(make_trajectory(" "), OPEN, reward).accuracy == 0
        assert endpoint.requests == []
    assert judge_module._JUDGES == {}


def test_importing_the_rewards_imports_no_client() -> None:
    program = "import sys, vz_ray.rewards; print(*{'openai', 'httpx2', 'math_verify'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("\n", 0), done.stderr


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    config: JudgeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_endpoint(always("1")) as endpoint:
        keyed = replace(config, base_url=endpoint.url, api_key_env="VZ_RAY_TEST_KEY")
        with pytest.raises(UserError, match="set VZ_RAY_TEST_KEY in the environment"):
            score_episode(make_trajectory("the dog"), OPEN, RewardConfig(judge=keyed))
        monkeypatch.setenv("VZ_RAY_TEST_KEY", "sesame")
        assert score_episode(make_trajectory("the dog"), OPEN, RewardConfig(judge=keyed)).accuracy == 1
        assert (
            score_episode(
                make_trajectory("a cat"), OPEN, RewardConfig(judge=replace(keyed, api_key_env=""))
            ).accuracy
            == 1
        )
    assert endpoint.keys == ["Bearer sesame", "Bearer none"]
    assert not any(b"sesame" in path.read_bytes() for path in Path(config.cache_dir).rglob("*.json"))


def test_threads_of_a_process_share_one_judge(config: JudgeConfig) -> None:
    with ThreadPoolExecutor(16) as pool:
        judges = set(pool.map(lambda _: get_judge(replace(config)), range(64)))
    assert len(judges) == 1
    assert get_judge(replace(config, model="another")) not in judges


def test_a_judge_that_is_closed_answers_its_askers(config: JudgeConfig) -> None:
    with serve_endpoint(always("1", after_s=20)) as endpoint:
        judge = Judge(replace(config, base_url=endpoint.url))
        caught: list[JudgeError] = []
        asking = threading.Thread(target=lambda: caught.append(refused(judge, "closed")))
        asking.start()
        while not endpoint.requests:
            time.sleep(0.01)
        judge.close()
        asking.join(10)
        assert len(caught) == 1


def test_a_variable_of_the_environment_does_not_move_the_endpoint(
    config: JudgeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with serve_endpoint(always("1")) as endpoint:
        judge = Judge(replace(config, base_url=endpoint.url))
        assert judge.judge_answer(*ASK) == JudgeVerdict(True)
        judge.close()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "m", "base_url": ""}, "reward.judge.base_url is ''"),
        ({"model": "m", "base_url": "judge:8000"}, "reward.judge.base_url is 'judge:8000'"),
        ({"concurrency": 0}, "reward.judge.max_concurrency is 0"),
        ({"attempts": 0}, "reward.judge.max_attempts is 0"),
        ({"deadline_s": 0.0}, "reward.judge.total_timeout_s is 0.0"),
        ({"timeout_s": float("inf")}, "reward.judge.request_timeout_s is inf"),
        ({"parameters": {"messages": []}}, "reward.judge.parameters has 'messages'"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JudgeConfig(**values)


def test_the_judge_must_be_done_before_the_scorer_is_given_up() -> None:
    with pytest.raises(ValueError, match=r"reward.timeout_s is 100; it must be above .* \(120\)"):
        RewardConfig(timeout_s=100)


CAPTION = replace(
    TASK,
    question="Describe the video.",
    answer="",
    answer_type=AnswerType.CAPTION,
    caption_questions=(
        CaptionQuestion("What runs?", "a dog"),
        CaptionQuestion("Where?", "in a park"),
        CaptionQuestion("Which way?\nA. left\nB. right", "B", AnswerType.MULTIPLE_CHOICE),
    ),
)
READ = {"What runs?": "A dog.", "Where?": "It does not say.", "Which way?": "B. right"}


def examiner(number: int, body: dict[str, Any]) -> FakeReply:
    """Reads a description, and grades what was read."""
    said = body["messages"][-1]["content"]
    if "<description>" in said:
        return FakeReply(next(answer for question, answer in READ.items() if f"Question: {question}" in said))
    return FakeReply("{'pred': 'yes', 'score': 5}" if "A dog." in said else "{'pred': 'no', 'score': 1}")


def test_a_caption_is_worth_the_share_of_its_questions_that_it_answers(config: JudgeConfig) -> None:
    with serve_endpoint(examiner) as endpoint:
        reward = RewardConfig(judge=replace(config, base_url=endpoint.url))
        parts = score_episode(make_trajectory("A dog runs to the right."), CAPTION, reward)
        again = score_episode(make_trajectory("A dog runs to the right."), CAPTION, reward)
    assert parts.valid
    assert parts.accuracy == pytest.approx(2 / 3)
    assert parts.extra == {"judge_score": 3.0}  # of the two that were graded
    assert again == parts
    # Three readings, two of which are graded; all are kept.
    assert len(endpoint.requests) == 5
    readings = [r for r in endpoint.requests if "<description>" in r["messages"][-1]["content"]]
    assert len(readings) == 3
    assert not any("a dog" in r["messages"][-1]["content"] for r in readings)


def test_a_caption_one_of_whose_questions_cannot_be_judged_is_invalid(config: JudgeConfig) -> None:
    def broken(number: int, body: dict[str, Any]) -> FakeReply:
        reply = examiner(number, body)
        return FakeReply("perhaps") if "'no'" in str(reply.text) else reply

    with serve_endpoint(broken) as endpoint:
        parts = score_episode(
            make_trajectory("A dog."), CAPTION, RewardConfig(judge=replace(config, base_url=endpoint.url))
        )
    assert (parts.valid, parts.reason) == (False, "judge nonsense")


def test_captions_want_time_for_two_steps(config: JudgeConfig) -> None:
    short = RewardConfig(judge=replace(config, total_timeout_s=60), timeout_s=100)
    check_scorers(short, [GRADED], "x")
    with pytest.raises(UserError, match=r"reward\.deadline_s is 100; x has captions.*above twice"):
        check_scorers(short, [CAPTION], "x")
    nothing = score_episode(
        make_trajectory("A dog."), replace(CAPTION, caption_questions=()), RewardConfig(judge=config)
    )
    assert nothing.reason == "no ground truth"
