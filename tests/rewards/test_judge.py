"""Judge client against a real HTTP server."""

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
from vz_ray.config.timeouts import TimeoutsConfig
from vz_ray.env.task import AnswerType, CaptionQuestion
from vz_ray.env.trajectory import JUDGE_FAILED_NOTE
from vz_ray.rewards import check_scorers, score_episode
from vz_ray.rewards import judge as judge_module
from vz_ray.rewards.judge import Judge, get_judge
from vz_ray.rewards.judge_protocol import JudgeForm, JudgeVerdict
from vz_ray.utils.errors import UserError
from vz_ray.utils.openai_endpoint import EndpointError

OPEN = replace(TASK, question="What runs?", answer="a dog", answer_type=AnswerType.OPEN_ENDED)
GRADED = replace(OPEN, answer_type=AnswerType.GRADED)
ASK = (JudgeForm.BINARY, "What runs?", "a dog", "the dog")


@pytest.fixture(autouse=True)
def fresh_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clear the process-wide judges: each test has its own server."""
    monkeypatch.setattr(judge_module, "_JUDGES", {})


@pytest.fixture
def config(tmp_path: Path) -> JudgeConfig:
    return JudgeConfig(
        model="judge", base_url="http://127.0.0.1:9/v1", cache_dir=str(tmp_path / "verdicts"),
        max_attempts=4, backoff_s=0.02, request_timeout_s=20, total_timeout_s=60,
    )  # fmt: skip


def always_reply(text: str | None = "1", **more: Any) -> ReplyScript:
    return lambda number, body: FakeReply(text, **more)


def assert_judge_fails(judge: Judge, reason: str) -> EndpointError:
    with pytest.raises(EndpointError) as caught:
        judge.judge_answer(*ASK)
    assert caught.value.reason == reason
    return caught.value


@pytest.mark.parametrize(("reply", "accuracy"), [("1", 1.0), ("0", 0.0), ("Verdict: 1", 1.0)])
def test_open_ended_accuracy_is_judge_verdict(config: JudgeConfig, reply: str, accuracy: float) -> None:
    with serve_endpoint(always_reply(reply)) as endpoint:
        reward = RewardConfig(judge=replace(config, base_url=endpoint.url))
        parts = score_episode(make_trajectory("the dog", GOOD), OPEN, reward)
    assert parts.valid
    assert (parts.accuracy, parts.tool, parts.extra) == (accuracy, accuracy, {})
    (request,) = endpoint.requests
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("judge", 0.0, 512)
    content = request["messages"][-1]["content"]
    assert [text in content for text in ("What runs?", "a dog", "<answer>the dog</answer>")] == [True] * 3


@pytest.mark.parametrize(("reply", "accuracy", "grade"), [("yes", 1.0, 4), ("no", 0.0, 1)])
def test_graded_answer_has_accuracy_and_judge_score(
    config: JudgeConfig, reply: str, accuracy: float, grade: int
) -> None:
    with serve_endpoint(always_reply(f"{{'pred': '{reply}', 'score': {grade}}}")) as endpoint:
        parts = score_episode(
            make_trajectory("the dog"), GRADED, RewardConfig(judge=replace(config, base_url=endpoint.url))
        )
    assert (parts.valid, parts.accuracy, parts.extra) == (True, accuracy, {"judge_score": float(grade)})


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (always_reply("Probably."), "judge malformed"),
        (always_reply(""), "judge malformed"),
        (always_reply(None), "judge malformed"),
        (
            always_reply(body=b"<html>gateway</html>", headers={"content-type": "text/html"}),
            "judge malformed",
        ),
        (always_reply(body=b'{"choices": []}'), "judge malformed"),
        (always_reply(body=b"[1]"), "judge malformed"),
        (always_reply(body=b"{", status=200), "judge malformed"),
        (always_reply(status=500, body=b"{}"), "judge status 500"),
        (always_reply(status=429, body=b"{}"), "judge status 429"),
        (always_reply(status=401, body=b'{"error": {"message": "bad key"}}'), "judge status 401"),
        (always_reply(hang_up=True), "judge connection"),
    ],
)
def test_failed_judge_request_invalidates_sample(config: JudgeConfig, script: ReplyScript, reason: str) -> None:
    with serve_endpoint(script) as endpoint:
        parts = score_episode(
            make_trajectory("the dog", GOOD), OPEN, RewardConfig(judge=replace(config, base_url=endpoint.url))
        )
    assert (parts.valid, parts.total, parts.accuracy) == (False, 0.0, 0.0)
    assert parts.reason == reason
    assert parts.judge_failed
    assert parts.reason.startswith(JUDGE_FAILED_NOTE)
    retryable = reason in ("judge status 500", "judge status 429", "judge connection")
    assert len(endpoint.requests) == (config.max_attempts if retryable else 1)


def test_retries_after_requested_delay(config: JudgeConfig) -> None:
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
    # At least half of the doubled backoff.
    assert endpoint.request_times_s[2] - endpoint.request_times_s[1] >= 0.1


def test_refused_connection_is_reported(config: JudgeConfig) -> None:
    error = assert_judge_fails(Judge(config), "connection")
    assert "127.0.0.1:9" in str(error)


def test_retries_after_request_timeout(config: JudgeConfig) -> None:
    with serve_endpoint(lambda number, body: FakeReply("1", delay_s=0 if number else 30)) as endpoint:
        judge = Judge(replace(config, base_url=endpoint.url, request_timeout_s=3))
        assert judge.judge_answer(*ASK) == JudgeVerdict(True)
        judge.close()
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize("script", [always_reply("1", delay_s=30), always_reply("1", trickle_s=0.2)])
def test_total_timeout_ends_slow_and_trickling_replies(config: JudgeConfig, script: ReplyScript) -> None:
    with serve_endpoint(script) as endpoint:
        judge = Judge(replace(config, base_url=endpoint.url, request_timeout_s=20, total_timeout_s=1.0))
        start_s = time.monotonic()
        assert_judge_fails(judge, "timeout")
        assert time.monotonic() - start_s < 15
        judge.close()


def test_no_retry_beyond_total_timeout(config: JudgeConfig) -> None:
    with serve_endpoint(always_reply(status=429, headers={"retry-after": "50"}, body=b"{}")) as endpoint:
        judge = Judge(replace(config, base_url=endpoint.url, total_timeout_s=20))
        start_s = time.monotonic()
        assert_judge_fails(judge, "status 429")
        assert time.monotonic() - start_s < 15
        judge.close()
    assert len(endpoint.requests) == 1


def test_max_concurrency_limits_requests(config: JudgeConfig) -> None:
    with serve_endpoint(always_reply("1", delay_s=0.05)) as endpoint:
        judge = Judge(replace(config, base_url=endpoint.url, max_concurrency=3))
        with ThreadPoolExecutor(24) as pool:
            answers = [f"dog {i}" for i in range(24)]
            verdicts = list(pool.map(lambda a: judge.judge_answer(JudgeForm.BINARY, "What?", "a dog", a), answers))
        judge.close()
    assert verdicts == [JudgeVerdict(True)] * 24
    assert len(endpoint.requests) == 24
    assert endpoint.max_concurrent == 3


def test_identical_requests_in_flight_are_coalesced(config: JudgeConfig) -> None:
    with serve_endpoint(always_reply("0", delay_s=0.3)) as endpoint:
        judge = Judge(replace(config, base_url=endpoint.url, use_cache=False))
        with ThreadPoolExecutor(8) as pool:
            verdicts = list(pool.map(lambda _: judge.judge_answer(*ASK), range(8)))
        assert verdicts == [JudgeVerdict(False)] * 8
        assert len(endpoint.requests) == 1
        judge.judge_answer(*ASK)
        assert len(endpoint.requests) == 2, "the disk cache is off"
        judge.close()


def test_disk_cache_is_shared_between_processes(config: JudgeConfig) -> None:
    with serve_endpoint(always_reply("1")) as endpoint:
        shared = replace(config, base_url=endpoint.url)
        first = Judge(shared)
        assert first.judge_answer(*ASK) == JudgeVerdict(True)
        first.close()
        program = (
            "import sys, json\n"
            "from vz_ray.config.reward import JudgeConfig\n"
            "from vz_ray.rewards.judge import *\n"
            "judge = Judge(JudgeConfig(**json.loads(sys.argv[1])))\n"
            "print(judge.judge_answer(JudgeForm.BINARY, *sys.argv[2:]), 'openai' in sys.modules)\n"
        )
        settings = json.dumps(vars(shared))
        done = subprocess.run(
            [sys.executable, "-c", program, settings, *ASK[1:]], capture_output=True, text=True, timeout=120
        )
    assert done.stdout == "JudgeVerdict(correct=True, score=None) False\n", done.stderr
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
def test_cache_key_covers_all_inputs(config: JudgeConfig, change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "judge.yaml").write_text("system: Be strict.\nuser: '{question} {truth} {answer}'\n")
    graded = "{'pred': 'no', 'score': 2}"
    with serve_endpoint(lambda number, body: FakeReply(graded if "dictionary" in str(body) else "1")) as endpoint:
        shared = replace(config, base_url=endpoint.url)
        Judge(shared).judge_answer(*ASK)
        arguments = dict(zip(("form", "question", "truth", "answer"), ASK, strict=True))
        settings = {
            key: value.format(tmp=tmp_path) if isinstance(value, str) else value
            for key, value in change.items()
            if key not in arguments
        }
        Judge(replace(shared, **settings)).judge_answer(
            **arguments | {k: v for k, v in change.items() if k in arguments}
        )
    assert len(endpoint.requests) == 2


def test_malformed_replies_are_not_cached(config: JudgeConfig) -> None:
    with serve_endpoint(lambda number, body: FakeReply(("perhaps", "1")[number])) as endpoint:
        judge = Judge(replace(config, base_url=endpoint.url))
        assert_judge_fails(judge, "malformed")
        assert judge.judge_answer(*ASK) == JudgeVerdict(True)
        judge.close()


def test_damaged_cache_entry_is_replaced(config: JudgeConfig) -> None:
    with serve_endpoint(always_reply("1")) as endpoint:
        judge = Judge(replace(config, base_url=endpoint.url))
        judge.judge_answer(*ASK)
        (entry,) = Path(config.cache_dir).rglob("*.json")
        for damage in (b"", b"{", b"[]", b'{"reply": "perhaps"}', b'{"reply": 1}'):
            entry.write_bytes(damage)
            assert judge.judge_answer(*ASK) == JudgeVerdict(True)
        judge.judge_answer(*ASK)
        judge.close()
    assert len(endpoint.requests) == 6


def test_unwritable_cache_does_not_fail_judging(config: JudgeConfig, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with serve_endpoint(always_reply("1")) as endpoint:
        judge = Judge(replace(config, base_url=endpoint.url, cache_dir=str(blocked)))
        assert judge.judge_answer(*ASK) == JudgeVerdict(True)
        judge.close()


def test_no_judge_for_answers_scored_by_rules(config: JudgeConfig) -> None:
    """Covers multiple choice, numbers, and open-ended questions without an answer."""
    with serve_endpoint(always_reply("1")) as endpoint:
        keyed = replace(config, base_url=endpoint.url, api_key_env="VZ_RAY_NO_SUCH_KEY")
        reward = RewardConfig(judge=keyed)
        number = replace(TASK, answer="3", answer_type=AnswerType.NUMBER)
        assert score_episode(make_trajectory("B", GOOD), TASK, reward).total == 1.5
        assert score_episode(make_trajectory("three"), number, reward).accuracy == 1
        assert score_episode(make_trajectory(None), OPEN, reward).accuracy == 0
        assert score_episode(make_trajectory(" "), OPEN, reward).accuracy == 0
        assert endpoint.requests == []
    assert judge_module._JUDGES == {}


def test_import_of_rewards_is_light() -> None:
    program = "import sys, vz_ray.rewards; print(*{'openai', 'httpx2', 'math_verify'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("\n", 0), done.stderr


def test_api_key_is_read_from_environment_only(config: JudgeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_endpoint(always_reply("1")) as endpoint:
        keyed = replace(config, base_url=endpoint.url, api_key_env="VZ_RAY_TEST_KEY")
        with pytest.raises(UserError, match="set VZ_RAY_TEST_KEY in the environment"):
            score_episode(make_trajectory("the dog"), OPEN, RewardConfig(judge=keyed))
        monkeypatch.setenv("VZ_RAY_TEST_KEY", "sesame")
        assert score_episode(make_trajectory("the dog"), OPEN, RewardConfig(judge=keyed)).accuracy == 1
        assert (
            score_episode(make_trajectory("a cat"), OPEN, RewardConfig(judge=replace(keyed, api_key_env=""))).accuracy
            == 1
        )
    assert endpoint.keys == ["Bearer sesame", "Bearer none"]
    assert not any(b"sesame" in path.read_bytes() for path in Path(config.cache_dir).rglob("*.json"))


def test_threads_share_one_judge(config: JudgeConfig) -> None:
    with ThreadPoolExecutor(16) as pool:
        judges = set(pool.map(lambda _: get_judge(replace(config)), range(64)))
    assert len(judges) == 1
    assert get_judge(replace(config, model="another")) not in judges


def test_close_fails_pending_requests(config: JudgeConfig) -> None:
    with serve_endpoint(always_reply("1", delay_s=20)) as endpoint:
        judge = Judge(replace(config, base_url=endpoint.url))
        caught: list[EndpointError] = []
        thread = threading.Thread(target=lambda: caught.append(assert_judge_fails(judge, "closed")))
        thread.start()
        while not endpoint.requests:
            time.sleep(0.01)
        judge.close()
        thread.join(10)
        assert len(caught) == 1


def test_openai_base_url_variable_is_ignored(config: JudgeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with serve_endpoint(always_reply("1")) as endpoint:
        judge = Judge(replace(config, base_url=endpoint.url))
        assert judge.judge_answer(*ASK) == JudgeVerdict(True)
        judge.close()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "m", "base_url": ""}, "base_url is ''"),
        ({"model": "m", "base_url": "judge:8000"}, "base_url is 'judge:8000'"),
        ({"max_concurrency": 0}, "max_concurrency is 0"),
        ({"max_attempts": 0}, "max_attempts is 0"),
        ({"backoff_s": 0.0}, "backoff_s is 0.0"),
        ({"parameters": {"messages": []}}, "parameters has 'messages'"),
    ],
)
def test_invalid_judge_config_is_rejected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JudgeConfig(**values)


def test_reward_timeout_must_exceed_judge_timeout() -> None:
    with pytest.raises(ValueError, match=r"score_s is 100; it must be above judge_s \(120\)"):
        TimeoutsConfig(score_s=100)
    with pytest.raises(ValueError, match=r"judge_request_s is inf"):
        TimeoutsConfig(judge_request_s=float("inf"))


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
CAPTION_ANSWERS = {"What runs?": "A dog.", "Where?": "Unknown.", "Which way?": "B. right"}


def caption_judge(number: int, body: dict[str, Any]) -> FakeReply:
    """Answer a question from the caption, or grade such an answer."""
    content = body["messages"][-1]["content"]
    if "<description>" in content:
        return FakeReply(next(text for question, text in CAPTION_ANSWERS.items() if f"Question: {question}" in content))
    return FakeReply("{'pred': 'yes', 'score': 5}" if "A dog." in content else "{'pred': 'no', 'score': 1}")


def test_caption_accuracy_is_share_of_questions(config: JudgeConfig) -> None:
    with serve_endpoint(caption_judge) as endpoint:
        reward = RewardConfig(judge=replace(config, base_url=endpoint.url))
        parts = score_episode(make_trajectory("A dog runs to the right."), CAPTION, reward)
        second_parts = score_episode(make_trajectory("A dog runs to the right."), CAPTION, reward)
    assert parts.valid
    assert parts.accuracy == pytest.approx(2 / 3)
    assert parts.extra == {"judge_score": 3.0}  # mean over the two graded questions
    assert second_parts == parts
    # Three readings and two grades; the second episode hits the cache.
    assert len(endpoint.requests) == 5
    readings = [r for r in endpoint.requests if "<description>" in r["messages"][-1]["content"]]
    assert len(readings) == 3
    assert not any("a dog" in r["messages"][-1]["content"] for r in readings)


def test_one_failed_question_invalidates_caption(config: JudgeConfig) -> None:
    def broken(number: int, body: dict[str, Any]) -> FakeReply:
        reply = caption_judge(number, body)
        return FakeReply("perhaps") if "'no'" in str(reply.text) else reply

    with serve_endpoint(broken) as endpoint:
        parts = score_episode(
            make_trajectory("A dog."), CAPTION, RewardConfig(judge=replace(config, base_url=endpoint.url))
        )
    assert (parts.valid, parts.reason) == (False, "judge malformed")


def test_captions_require_twice_the_judge_timeout(config: JudgeConfig) -> None:
    short = RewardConfig(judge=replace(config, total_timeout_s=60), timeout_s=100)
    check_scorers(short, [GRADED], "x")
    with pytest.raises(UserError, match=r"timeouts\.score_s is 100; it must be above twice .* x has captions"):
        check_scorers(short, [CAPTION], "x")
    parts = score_episode(make_trajectory("A dog."), replace(CAPTION, caption_questions=()), RewardConfig(judge=config))
    assert parts.reason == "no ground truth"
