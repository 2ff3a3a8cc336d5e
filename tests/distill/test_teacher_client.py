"""Teacher client against a real HTTP server."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.distill.oracle_server import make_completion, message_text, request_images
from tests.distill.teacher_episodes import CONFIG
from tests.rewards.fake_endpoint import FakeReply, serve_endpoint
from vz_ray.config.distill import TeacherConfig
from vz_ray.distill.chat_messages import TeacherPrompt, add_teacher_prompt, truncate_to_one_turn
from vz_ray.distill.cost_ledger import CostLedger
from vz_ray.distill.teacher_client import CostLimitReached, TeacherClient
from vz_ray.env.chat_format import IMAGE_SLOT
from vz_ray.env.protocols import PromptMessage
from vz_ray.env.trajectory import SamplingParams
from vz_ray.utils.errors import UserError
from vz_ray.utils.json_lines import read_complete_lines
from vz_ray.utils.openai_endpoint import EndpointError
from vz_ray.video.frame import Frame, FrameRef, FrameSize
from vz_ray.video.image_reader import read_image

ANSWER = "<think>a</think><answer>B</answer>"


def frame(shade: int) -> Frame:
    rgb = np.full((28, 56, 3), shade, dtype=np.uint8)
    return Frame(FrameRef("blake3:v", "v.mp4", 0, float(shade), 56, 28, "s", "d", f"{shade:064x}"), rgb)


MESSAGES = [
    PromptMessage("system", "You may zoom."),
    PromptMessage("user", f"<f0>{IMAGE_SLOT}<f1>{IMAGE_SLOT}\nWhat?", (frame(10), frame(200))),
]


@pytest.fixture
def config() -> TeacherConfig:
    return replace(CONFIG, image_format="png")


def complete(config, tmp_path: Path, *, times: int = 1, name: str = "t", **client_options):
    """Request `times` completions concurrently; return the replies or exceptions, and the ledger."""

    async def run():
        ledger = CostLedger(tmp_path / "replies.jsonl", config.max_cost_usd)
        teacher = TeacherClient(config, ledger, **client_options)
        sampling = SamplingParams(0.7, 0.9, 100)
        turns = (teacher.complete(MESSAGES, sampling, request_id=f"{name}{i}", image_cache={}) for i in range(times))
        try:
            return await asyncio.gather(*turns, return_exceptions=True), ledger
        finally:
            await teacher.close()

    return asyncio.run(run())


def test_frames_are_sent_as_interleaved_images(config, tmp_path):
    with serve_endpoint(lambda number, body: make_completion(ANSWER)) as endpoint:
        (reply,), ledger = complete(replace(config, base_url=endpoint.url), tmp_path)
    (body,) = endpoint.requests
    kinds = [part["type"] for part in body["messages"][1]["content"]]
    assert kinds == ["text", "image_url", "text", "image_url", "text"]
    assert message_text(body["messages"][1]) == "<f0><f1>\nWhat?"
    assert body["messages"][0] == {"role": "system", "content": "You may zoom."}
    for number, data in enumerate(request_images(body)):
        (tmp_path / f"{number}.png").write_bytes(data)
        shown = read_image(str(tmp_path / f"{number}.png"), FrameSize(784, 10**6, 28))
        np.testing.assert_array_equal(shown.rgb, MESSAGES[1].frames[number].rgb)
    assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == (
        "oracle",
        0.7,
        0.9,
        100,
    )
    assert body["stop"] == ["</video_zoom>"]
    assert reply.text == ANSWER
    assert reply.cost_usd == pytest.approx(1000 * 10 / 1e6 + 50 * 100 / 1e6)
    assert ledger.totals.cost_usd == pytest.approx(reply.cost_usd)
    assert ledger.totals.reserved_usd == 0


def test_recorded_reply_is_not_requested_again(config, tmp_path):
    with serve_endpoint(lambda number, body: make_completion(f"{number}")) as endpoint:
        served = replace(config, base_url=endpoint.url)
        first, _ = complete(served, tmp_path, times=3)
        repeated, ledger = complete(served, tmp_path, times=3)
        another, _ = complete(served, tmp_path, name="another turn")
    assert [r.text for r in repeated] == [r.text for r in first]
    assert len(endpoint.requests) == 4
    assert another[0].text == "3"
    assert ledger.totals.requests == 3


@pytest.mark.parametrize(
    "bad",
    [
        FakeReply(status=429, body=b"{}", headers={"retry-after": "0.1"}),
        FakeReply(status=500, body=b"oops"),
        FakeReply(status=503, body=b""),
        FakeReply(hang_up=True),
        FakeReply(body=b"{not json"),
        FakeReply(body=b'{"choices": []}'),
        FakeReply(body=b"[]"),
    ],
    ids=["429", "500", "503", "hang up", "broken JSON", "no choices", "a list"],
)
def test_transient_failures_are_retried(config, tmp_path, bad):
    with serve_endpoint(lambda number, body: bad if number < 2 else make_completion(ANSWER)) as endpoint:
        (reply,), ledger = complete(replace(config, base_url=endpoint.url), tmp_path)
    assert reply.text == ANSWER
    assert len(endpoint.requests) == 3
    assert ledger.totals.requests == 3
    # Only an error status guarantees that the request is not charged.
    assert (ledger.totals.rejected, ledger.totals.reserved_usd > 0) == ((2, False) if bad.status > 200 else (0, True))


def test_retry_after_is_honored(config, tmp_path):
    later = FakeReply(status=429, body=b"{}", headers={"retry-after": "1.5"})
    with serve_endpoint(lambda number, body: make_completion(ANSWER) if number else later) as endpoint:
        complete(replace(config, base_url=endpoint.url), tmp_path)
    assert endpoint.request_times_s[1] - endpoint.request_times_s[0] >= 1.5


def test_trickling_reply_times_out_and_stays_reserved(config, tmp_path):
    slow = replace(config, request_timeout_s=0.6, max_attempts=2)
    with serve_endpoint(lambda number, body: replace(make_completion(ANSWER), trickle_s=0.05)) as endpoint:
        start_s = time.monotonic()
        (failed,), ledger = complete(replace(slow, base_url=endpoint.url), tmp_path)
    assert isinstance(failed, EndpointError)
    assert failed.reason == "timeout"
    assert time.monotonic() - start_s < 10
    assert len(endpoint.requests) == 2
    assert ledger.totals.reserved_usd > 0


def test_queueing_does_not_count_towards_turn_timeout(config, tmp_path):
    queued = replace(config, max_concurrency=1, turn_timeout_s=1.5)
    with serve_endpoint(lambda number, body: replace(make_completion(ANSWER), delay_s=0.4)) as endpoint:
        replies, _ = complete(replace(queued, base_url=endpoint.url), tmp_path, times=6)
    assert [reply.text for reply in replies] == [ANSWER] * 6


def test_stop_interrupts_backoff(config, tmp_path):
    class Stop(Exception):
        pass

    checks = []

    def stopping() -> None:
        checks.append(time.monotonic())
        if len(checks) > 3:
            raise Stop

    later = FakeReply(status=429, body=b"{}", headers={"retry-after": "50"})
    with serve_endpoint(lambda number, body: later) as endpoint:
        start_s = time.monotonic()
        (stopped,), _ = complete(replace(config, base_url=endpoint.url), tmp_path, check=stopping)
    assert isinstance(stopped, Stop)
    assert time.monotonic() - start_s < 20


def test_estimates_adapt_to_reported_usage(config, tmp_path):
    async def token_ratios(url: str) -> list[float]:
        teacher = TeacherClient(
            replace(config, base_url=url, tokens_per_image=1), CostLedger(tmp_path / "replies.jsonl")
        )
        ratios = []
        for batch in range(2):
            turns = (
                teacher.complete(MESSAGES, SamplingParams(max_tokens=9), request_id=f"{batch}/{i}", image_cache={})
                for i in range(4)
            )
            await asyncio.gather(*turns)
            ratios.append(teacher._token_ratio)
        await teacher.close()
        return ratios

    with serve_endpoint(lambda number, body: make_completion(ANSWER)) as endpoint:
        first, second = asyncio.run(token_ratios(endpoint.url))
    # The estimate is about 60 tokens; the server reports 1000.
    assert first == second > 10
    reserved = [line["usd"] for line in read_complete_lines(tmp_path / "replies.jsonl") if "reserved" in line]
    assert max(reserved[:4]) < min(reserved[4:])
    assert reserved[-1] == pytest.approx((1000 * 10 + 9 * 100) / 1e6, rel=0.01)


def test_turn_timeout_ends_slow_request(config, tmp_path):
    slow = replace(config, turn_timeout_s=0.5, request_timeout_s=20)
    with serve_endpoint(lambda number, body: replace(make_completion(ANSWER), delay_s=2.0)) as endpoint:
        (failed,), _ = complete(replace(slow, base_url=endpoint.url), tmp_path)
    assert isinstance(failed, EndpointError)
    assert failed.reason == "timeout"


def test_refused_connection_fails_after_max_attempts(config, tmp_path):
    (failed,), ledger = complete(config, tmp_path)
    assert isinstance(failed, EndpointError)
    assert failed.reason == "connection"
    assert ledger.totals.requests == 4


def test_bad_request_is_not_retried(config, tmp_path):
    with serve_endpoint(lambda number, body: FakeReply(status=400, body=b'{"error": "too long"}')) as endpoint:
        (failed,), ledger = complete(replace(config, base_url=endpoint.url), tmp_path)
    assert isinstance(failed, EndpointError)
    assert failed.reason == "status 400"
    assert len(endpoint.requests) == ledger.totals.rejected == 1


@pytest.mark.parametrize(("status", "fix"), [(401, "api_key_env"), (403, "api_key_env"), (404, "teacher.model")])
def test_fatal_status_raises_user_error(config, tmp_path, status, fix):
    with serve_endpoint(lambda number, body: FakeReply(status=status, body=b"{}")) as endpoint:
        (failed,), _ = complete(replace(config, base_url=endpoint.url), tmp_path)
    assert isinstance(failed, UserError)
    assert fix in str(failed)


def test_api_key_is_read_from_environment(config, tmp_path, monkeypatch):
    keyed = replace(config, api_key_env="TEACHER_KEY")
    with pytest.raises(UserError, match="TEACHER_KEY"):
        complete(keyed, tmp_path)
    monkeypatch.setenv("TEACHER_KEY", "sesame")
    with serve_endpoint(lambda number, body: make_completion(ANSWER)) as endpoint:
        complete(replace(keyed, base_url=endpoint.url), tmp_path)
    assert endpoint.keys == ["Bearer sesame"]


def test_max_concurrency_limits_requests(config, tmp_path):
    few = replace(config, max_concurrency=2)
    with serve_endpoint(lambda number, body: replace(make_completion(ANSWER), delay_s=0.1)) as endpoint:
        complete(replace(few, base_url=endpoint.url), tmp_path, times=8)
    assert endpoint.max_concurrent == 2


def test_rate_limit_delays_requests(config, tmp_path, monkeypatch):
    monkeypatch.setattr("vz_ray.distill.rate_limiter.WINDOW_S", 3.0)
    paced = replace(config, requests_per_minute=2)
    with serve_endpoint(lambda number, body: make_completion(ANSWER)) as endpoint:
        complete(replace(paced, base_url=endpoint.url), tmp_path, times=4)
    # The first request may arrive late on a busy machine.
    assert endpoint.request_times_s[2] - endpoint.request_times_s[0] >= 1.5
    assert endpoint.request_times_s[3] - endpoint.request_times_s[1] >= 1.5


def test_budget_is_never_exceeded(config, tmp_path):
    with serve_endpoint(lambda number, body: make_completion(ANSWER)) as endpoint:
        # Maximum cost 0.0168 (680 prompt and 100 completion tokens), actual cost 0.015.
        limited = replace(config, base_url=endpoint.url, max_cost_usd=0.05)
        replies, ledger = complete(limited, tmp_path, times=8)
        assert sum(isinstance(reply, CostLimitReached) for reply in replies) == 5
        assert ledger.totals.cost_usd == pytest.approx(0.045)
        assert len(endpoint.requests) == 3
        stopped, _ = complete(limited, tmp_path, times=8, name="later")
        assert all(isinstance(reply, CostLimitReached) for reply in stopped)
        more, ledger = complete(replace(limited, max_cost_usd=0.2), tmp_path, times=8)
    assert not any(isinstance(reply, Exception) for reply in more)
    assert len(endpoint.requests) == 8
    assert ledger.totals.cost_usd == pytest.approx(8 * 0.015)


def test_missing_usage_is_charged_at_maximum(config, tmp_path):
    with serve_endpoint(lambda number, body: make_completion(ANSWER, usage=False)) as endpoint:
        (reply,), ledger = complete(replace(config, base_url=endpoint.url), tmp_path)
    assert not reply.usage_reported
    assert reply.completion_tokens == 100
    assert reply.prompt_tokens > 2 * 300
    assert ledger.totals.cost_usd == pytest.approx(reply.cost_usd)


def test_missing_text_is_empty_reply(config, tmp_path):
    with serve_endpoint(lambda number, body: make_completion(None, finish_reason="content_filter")) as endpoint:
        (reply,), _ = complete(replace(config, base_url=endpoint.url), tmp_path)
    assert (reply.text, reply.finish_reason) == ("", "content_filter")


def test_parameters_can_be_renamed_and_removed(config, tmp_path):
    hosted = replace(
        config,
        max_tokens_param="max_completion_tokens",
        parameters={"stop": None, "top_p": None, "reasoning": "low"},
    )
    with serve_endpoint(lambda number, body: make_completion(ANSWER)) as endpoint:
        complete(replace(hosted, base_url=endpoint.url), tmp_path)
    (body,) = endpoint.requests
    assert body["max_completion_tokens"] == 100
    assert not {"stop", "top_p", "max_tokens"} & set(body)
    assert json.dumps(body["reasoning"]) == '"low"'


@pytest.mark.parametrize(
    ("text", "stop", "turn"),
    [
        ("<think>t</think><video_zoom>{}", "stop", "<think>t</think><video_zoom>{}</video_zoom>"),
        ("<video_zoom>{}</video_zoom>", "stop", "<video_zoom>{}</video_zoom>"),
        ("<video_zoom>{}</video_zoom>\nand on <answer>A</answer>", "stop", "<video_zoom>{}</video_zoom>"),
        ("<video_zoom>{}</video_zoom><video_zoom>{}</video_zoom>", "stop", "<video_zoom>{}</video_zoom>"),
        ("<video_zoom>{", "length", "<video_zoom>{"),
        ("\n<answer>A</answer>\n", "stop", "<answer>A</answer>"),
        ("", "stop", ""),
    ],
)
def test_turn_ends_with_first_zoom_call(text, stop, turn):
    assert truncate_to_one_turn(text, stop) == turn


def test_teacher_prompt_is_added_once():
    messages = [
        PromptMessage("system", "S"),
        PromptMessage("user", "Q"),
        PromptMessage("assistant", "z"),
        PromptMessage("user", "R1"),
        PromptMessage("assistant", "z"),
        PromptMessage("user", "R2"),
    ]
    teacher_prompt = TeacherPrompt("more", "!")
    assert [m.text for m in add_teacher_prompt(messages, teacher_prompt, 1)] == [
        "S\nmore",
        "Q",
        "z",
        "R1!",
        "z",
        "R2",
    ]
    assert [m.text for m in add_teacher_prompt(messages, teacher_prompt, 0)] == [
        "S\nmore",
        "Q!",
        "z",
        "R1",
        "z",
        "R2",
    ]
    assert add_teacher_prompt(messages, TeacherPrompt(), 0) == messages


@pytest.mark.parametrize("text", ["system: a\n", "system: a\nturn: 3\n", "- a\n", "a: [\n"])
def test_invalid_prompt_file_is_reported(tmp_path, text):
    path = tmp_path / "teacher.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"teacher\.yaml"):
        TeacherPrompt.load(path)


@pytest.mark.parametrize("path", ["conf/prompt/teacher.yaml", "conf/prompt/reflect.yaml"])
def test_shipped_prompts_are_valid(path):
    assert "<video_zoom>" in TeacherPrompt.load(path).system
