"""One turn of an expert, against a real HTTP server."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.distill.oracle_server import make_completion, message_text, request_images
from tests.rewards.fake_endpoint import FakeReply as Http
from tests.rewards.fake_endpoint import serve_endpoint
from vz_ray.config.distill import TeacherConfig
from vz_ray.distill.chat_messages import TeacherPrompt, add_teacher_prompt, truncate_to_one_turn
from vz_ray.distill.cost_ledger import CostLedger
from vz_ray.distill.teacher_client import CostLimitReached, TeacherClient, TeacherError
from vz_ray.env.chat_format import IMAGE_SLOT
from vz_ray.env.protocols import PromptMessage
from vz_ray.env.trajectory import SamplingParams
from vz_ray.utils.errors import UserError
from vz_ray.utils.json_lines import read_complete_lines
from vz_ray.video.frame import Frame, FrameRef, FrameSize
from vz_ray.video.image_reader import read_image

ANSWER = "<think>a</think><answer>B</answer>"


def frame(shade: int) -> Frame:
    rgb = np.full((28, 56, 3), shade, dtype=np.uint8)
    return Frame(FrameRef("blake3:v", "v.mp4", 0, float(shade), 56, 28, "s", "d", f"{shade:064x}"), rgb)


ASK = [
    PromptMessage("system", "You may zoom."),
    PromptMessage("user", f"<f0>{IMAGE_SLOT}<f1>{IMAGE_SLOT}\nWhat?", (frame(10), frame(200))),
]


@pytest.fixture
def config() -> TeacherConfig:
    return TeacherConfig(
        model="oracle", base_url="http://127.0.0.1:9/v1", max_attempts=4, backoff_s=0.02,
        request_timeout_s=20, turn_timeout_s=60, input_usd_per_mtok=10.0, output_usd_per_mtok=100.0, image_format="png",
    )  # fmt: skip


def ask(config, tmp_path: Path, *, times: int = 1, name: str = "t", **more):
    """`times` different turns, asked at once; replies, and the account afterwards."""

    async def go():
        account = CostLedger(tmp_path / "replies.jsonl", config.limit_usd)
        expert = TeacherClient(config, account, **more)
        sampling = SamplingParams(0.7, 0.9, 100)
        turns = (expert.complete(ASK, sampling, request=f"{name}{i}", image_cache={}) for i in range(times))
        try:
            return await asyncio.gather(*turns, return_exceptions=True), account
        finally:
            await expert.close()

    return asyncio.run(go())


def test_frames_go_out_as_images_in_their_places(config, tmp_path):
    with serve_endpoint(lambda number, body: make_completion(ANSWER)) as endpoint:
        (reply,), account = ask(replace(config, base_url=endpoint.url), tmp_path)
    (body,) = endpoint.requests
    kinds = [part["type"] for part in body["messages"][1]["content"]]
    assert kinds == ["text", "image_url", "text", "image_url", "text"]
    assert message_text(body["messages"][1]) == "<f0><f1>\nWhat?"
    assert body["messages"][0] == {"role": "system", "content": "You may zoom."}
    for number, data in enumerate(request_images(body)):
        (tmp_path / f"{number}.png").write_bytes(data)
        shown = read_image(str(tmp_path / f"{number}.png"), FrameSize(784, 10**6))
        np.testing.assert_array_equal(shown.rgb, ASK[1].frames[number].rgb)
    assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == (
        "oracle",
        0.7,
        0.9,
        100,
    )
    assert body["stop"] == ["</video_zoom>"]
    assert reply.text == ANSWER
    assert reply.cost_usd == pytest.approx(1000 * 10 / 1e6 + 50 * 100 / 1e6)
    assert account.totals.cost_usd == pytest.approx(reply.cost_usd)
    assert account.totals.reserved_usd == 0


def test_a_reply_on_disk_is_not_asked_for_again(config, tmp_path):
    with serve_endpoint(lambda number, body: make_completion(f"{number}")) as endpoint:
        served = replace(config, base_url=endpoint.url)
        first, _ = ask(served, tmp_path, times=3)
        again, account = ask(served, tmp_path, times=3)
        other, _ = ask(served, tmp_path, name="another turn")
    assert [r.text for r in again] == [r.text for r in first]
    assert len(endpoint.requests) == 4
    assert other[0].text == "3"
    assert account.totals.requests == 3


@pytest.mark.parametrize(
    "bad",
    [
        Http(status=429, body=b"{}", headers={"retry-after": "0.1"}),
        Http(status=500, body=b"oops"),
        Http(status=503, body=b""),
        Http(hang_up=True),
        Http(body=b"{not json"),
        Http(body=b'{"choices": []}'),
        Http(body=b"[]"),
    ],
    ids=["429", "500", "503", "hang up", "broken JSON", "no choices", "a list"],
)
def test_what_may_pass_is_tried_again(config, tmp_path, bad):
    with serve_endpoint(lambda number, body: bad if number < 2 else make_completion(ANSWER)) as endpoint:
        (reply,), account = ask(replace(config, base_url=endpoint.url), tmp_path)
    assert reply.text == ANSWER
    assert len(endpoint.requests) == 3
    assert account.totals.requests == 3
    # Only a status is a server's word that nothing is charged.
    assert (account.totals.rejected, account.totals.reserved_usd > 0) == (
        (2, False) if bad.status > 200 else (0, True)
    )


def test_a_server_is_given_the_time_it_asks_for(config, tmp_path):
    later = Http(status=429, body=b"{}", headers={"retry-after": "1.5"})
    with serve_endpoint(lambda number, body: make_completion(ANSWER) if number else later) as endpoint:
        ask(replace(config, base_url=endpoint.url), tmp_path)
    assert endpoint.request_times_s[1] - endpoint.request_times_s[0] >= 1.5


def test_a_reply_that_trickles_is_given_up_and_counts_at_its_most(config, tmp_path):
    slow = replace(config, timeout_s=0.6, attempts=2)
    with serve_endpoint(lambda number, body: replace(make_completion(ANSWER), trickle_s=0.05)) as endpoint:
        began = time.monotonic()
        (failed,), account = ask(replace(slow, base_url=endpoint.url), tmp_path)
    assert isinstance(failed, TeacherError)
    assert failed.reason == "timeout"
    assert time.monotonic() - began < 10
    assert len(endpoint.requests) == 2
    assert account.totals.reserved_usd > 0


def test_waiting_for_a_place_takes_none_of_a_turn_s_time(config, tmp_path):
    queued = replace(config, concurrency=1, turn_s=1.5)
    with serve_endpoint(lambda number, body: replace(make_completion(ANSWER), delay_s=0.4)) as endpoint:
        replies, _ = ask(replace(queued, base_url=endpoint.url), tmp_path, times=6)
    assert [reply.text for reply in replies] == [ANSWER] * 6


def test_a_stop_is_heard_while_a_server_makes_it_wait(config, tmp_path):
    class Stop(Exception):
        pass

    checks = []

    def stopping() -> None:
        checks.append(time.monotonic())
        if len(checks) > 3:
            raise Stop

    later = Http(status=429, body=b"{}", headers={"retry-after": "50"})
    with serve_endpoint(lambda number, body: later) as endpoint:
        began = time.monotonic()
        (stopped,), _ = ask(replace(config, base_url=endpoint.url), tmp_path, check=stopping)
    assert isinstance(stopped, Stop)
    assert time.monotonic() - began < 20


def test_estimates_follow_what_the_server_counts(config, tmp_path):
    async def go(url: str) -> list[float]:
        expert = TeacherClient(
            replace(config, base_url=url, image_tokens=1), CostLedger(tmp_path / "replies.jsonl")
        )
        ratios = []
        for batch in range(2):
            turns = (
                expert.complete(ASK, SamplingParams(max_tokens=9), request=f"{batch}/{i}", image_cache={})
                for i in range(4)
            )
            await asyncio.gather(*turns)
            ratios.append(expert._ratio)
        await expert.close()
        return ratios

    with serve_endpoint(lambda number, body: make_completion(ANSWER)) as endpoint:
        first, second = asyncio.run(go(endpoint.url))
    # The text is about 60 tokens by the estimate, and 1000 by the server's word.
    assert first == second > 10
    asked = [line["usd"] for line in read_complete_lines(tmp_path / "replies.jsonl") if "asked" in line]
    assert max(asked[:4]) < min(asked[4:])
    assert asked[-1] == pytest.approx((1000 * 10 + 9 * 100) / 1e6, rel=0.01)


def test_a_turn_has_a_deadline_of_its_own(config, tmp_path):
    slow = replace(config, turn_s=0.5, timeout_s=20)
    with serve_endpoint(lambda number, body: replace(make_completion(ANSWER), delay_s=2.0)) as endpoint:
        (failed,), _ = ask(replace(slow, base_url=endpoint.url), tmp_path)
    assert isinstance(failed, TeacherError)
    assert failed.reason == "timeout"


def test_nobody_there_is_a_failure_after_all_attempts(config, tmp_path):
    (failed,), account = ask(config, tmp_path)
    assert isinstance(failed, TeacherError)
    assert failed.reason == "connection"
    assert account.totals.requests == 4


def test_a_request_that_the_server_finds_wrong_is_not_repeated(config, tmp_path):
    with serve_endpoint(lambda number, body: Http(status=400, body=b'{"error": "too long"}')) as endpoint:
        (failed,), account = ask(replace(config, base_url=endpoint.url), tmp_path)
    assert isinstance(failed, TeacherError)
    assert failed.reason == "status 400"
    assert len(endpoint.requests) == account.totals.rejected == 1


@pytest.mark.parametrize(
    ("status", "fix"), [(401, "api_key_env"), (403, "api_key_env"), (404, "expert.model")]
)
def test_what_no_request_can_pass_is_for_the_user(config, tmp_path, status, fix):
    with serve_endpoint(lambda number, body: Http(status=status, body=b"{}")) as endpoint:
        (failed,), _ = ask(replace(config, base_url=endpoint.url), tmp_path)
    assert isinstance(failed, UserError)
    assert fix in str(failed)


def test_the_key_comes_from_the_environment(config, tmp_path, monkeypatch):
    keyed = replace(config, api_key_env="EXPERT_KEY")
    with pytest.raises(UserError, match="EXPERT_KEY"):
        ask(keyed, tmp_path)
    monkeypatch.setenv("EXPERT_KEY", "sesame")
    with serve_endpoint(lambda number, body: make_completion(ANSWER)) as endpoint:
        ask(replace(keyed, base_url=endpoint.url), tmp_path)
    assert endpoint.keys == ["Bearer sesame"]


def test_no_more_requests_at_once_than_allowed(config, tmp_path):
    few = replace(config, concurrency=2)
    with serve_endpoint(lambda number, body: replace(make_completion(ANSWER), delay_s=0.1)) as endpoint:
        ask(replace(few, base_url=endpoint.url), tmp_path, times=8)
    assert endpoint.max_concurrent == 2


def test_requests_above_the_minute_s_limit_wait(config, tmp_path, monkeypatch):
    monkeypatch.setattr("vz_ray.distill.rate_limiter.WINDOW_S", 3.0)
    paced = replace(config, requests_per_minute=2)
    with serve_endpoint(lambda number, body: make_completion(ANSWER)) as endpoint:
        ask(replace(paced, base_url=endpoint.url), tmp_path, times=4)
    # The first may have been late in arriving; on a busy machine by more than a second.
    assert endpoint.request_times_s[2] - endpoint.request_times_s[0] >= 1.5
    assert endpoint.request_times_s[3] - endpoint.request_times_s[1] >= 1.5


def test_nothing_is_asked_that_could_pass_the_limit(config, tmp_path):
    with serve_endpoint(lambda number, body: make_completion(ANSWER)) as endpoint:
        # Each may cost 0.0168 (680 tokens in, 100 out) and costs 0.015.
        limited = replace(config, base_url=endpoint.url, limit_usd=0.05)
        replies, account = ask(limited, tmp_path, times=8)
        assert sum(isinstance(reply, CostLimitReached) for reply in replies) == 5
        assert account.totals.cost_usd == pytest.approx(0.045)
        assert len(endpoint.requests) == 3
        stopped, _ = ask(limited, tmp_path, times=8, name="later")
        assert all(isinstance(reply, CostLimitReached) for reply in stopped)
        more, account = ask(replace(limited, limit_usd=0.2), tmp_path, times=8)
    assert not any(isinstance(reply, Exception) for reply in more)
    assert len(endpoint.requests) == 8
    assert account.totals.cost_usd == pytest.approx(8 * 0.015)


def test_a_server_that_counts_nothing_is_charged_for_the_most(config, tmp_path):
    with serve_endpoint(lambda number, body: make_completion(ANSWER, usage=False)) as endpoint:
        (reply,), account = ask(replace(config, base_url=endpoint.url), tmp_path)
    assert not reply.usage_reported
    assert reply.completion_tokens == 100
    assert reply.prompt_tokens > 2 * 300
    assert account.totals.cost_usd == pytest.approx(reply.cost_usd)


def test_no_text_is_an_empty_reply(config, tmp_path):
    with serve_endpoint(lambda number, body: make_completion(None, stop="content_filter")) as endpoint:
        (reply,), _ = ask(replace(config, base_url=endpoint.url), tmp_path)
    assert (reply.text, reply.finish_reason) == ("", "content_filter")


def test_parameters_can_be_renamed_and_left_out(config, tmp_path):
    hosted = replace(
        config,
        tokens_key="max_completion_tokens",
        parameters={"stop": None, "top_p": None, "reasoning": "low"},
    )
    with serve_endpoint(lambda number, body: make_completion(ANSWER)) as endpoint:
        ask(replace(hosted, base_url=endpoint.url), tmp_path)
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
def test_a_turn_ends_with_its_first_zoom_whatever_the_server_does_there(text, stop, turn):
    assert truncate_to_one_turn(text, stop) == turn


def test_the_guide_is_told_once_where_the_expert_takes_over():
    asked = [
        PromptMessage("system", "S"), PromptMessage("user", "Q"), PromptMessage("assistant", "z"), PromptMessage("user", "R1"),
        PromptMessage("assistant", "z"), PromptMessage("user", "R2"),
    ]  # fmt: skip
    guide = TeacherPrompt("more", "!")
    assert [m.text for m in add_teacher_prompt(asked, guide, 1)] == ["S\nmore", "Q", "z", "R1!", "z", "R2"]
    assert [m.text for m in add_teacher_prompt(asked, guide, 0)] == ["S\nmore", "Q!", "z", "R1", "z", "R2"]
    assert add_teacher_prompt(asked, TeacherPrompt(), 0) == asked


@pytest.mark.parametrize("text", ["system: a\n", "system: a\nturn: 3\n", "- a\n", "a: [\n"])
def test_a_prompt_file_of_another_shape_is_named(tmp_path, text):
    path = tmp_path / "guide.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"guide\.yaml"):
        TeacherPrompt.load(path)


@pytest.mark.parametrize("path", ["conf/prompt/teacher.yaml", "conf/prompt/reflect.yaml"])
def test_the_prompts_that_come_with_it_can_be_read(path):
    assert "<video_zoom>" in TeacherPrompt.load(path).system
