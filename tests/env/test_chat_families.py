"""Chat formats with the templates of the families: reasoning, system prompts, frame texts."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest

from tests.env.chat_templates import QWEN2_5_VL, QWEN3_5, QWEN3_5_SMALL, QWEN3_VL_INSTRUCT, QWEN3_VL_THINKING
from tests.env.conftest import make_clip
from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.sft_file import sample_to_trajectory, trajectory_to_sample
from vz_ray.env.chat_format import IMAGE_SLOT, ChatFormat
from vz_ray.env.prompt_template import PromptTemplate
from vz_ray.env.task import ChatHistory, Task
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, SampledAction, SamplingParams, VersionSpan
from vz_ray.env.zoom_env import ZoomEnv
from vz_ray.env.zoom_gate import forced_prefix
from vz_ray.rewards.format import is_well_formed
from vz_ray.video.frame import ZoomRequest
from vz_ray.video.image_grid import ImageGrid

GRID = ImageGrid(patch_size=16, merge_size=2)
FRAME_TEXT = "<{time:.1f} seconds>{image}"
OPEN, EMPTY = "<think>\n", "<think>\n\n</think>\n\n"
CALL = '<video_zoom>{"segment": [8, 12], "fps": 1}</video_zoom>'
CASES = [
    pytest.param(QWEN2_5_VL, "auto", "", id="qwen2.5-vl"),
    pytest.param(QWEN3_VL_INSTRUCT, "auto", "", id="qwen3-vl-instruct"),
    pytest.param(QWEN3_VL_THINKING, "auto", OPEN, id="qwen3-vl-thinking"),
    pytest.param(QWEN3_5, "auto", OPEN, id="qwen3.5-auto"),
    pytest.param(QWEN3_5, "on", OPEN, id="qwen3.5-on"),
    pytest.param(QWEN3_5, "off", EMPTY, id="qwen3.5-off"),
    pytest.param(QWEN3_5_SMALL, "auto", EMPTY, id="qwen3.5-small-auto"),
    pytest.param(QWEN3_5_SMALL, "on", OPEN, id="qwen3.5-small-on"),
]


@pytest.fixture
def make_format(tokenizer):
    def make(chat_template: str, thinking: str = "auto", **template: str) -> ChatFormat:
        model_tokenizer = deepcopy(tokenizer)
        model_tokenizer.chat_template = chat_template
        prompts = replace(PromptTemplate.load("conf/prompt/zoom.yaml"), **template)
        return ChatFormat(model_tokenizer, prompts, grid=GRID, frame_text=FRAME_TEXT, thinking=thinking)

    return make


def decode(chat_format: ChatFormat, ids) -> str:
    return chat_format.tokenizer.decode(list(ids), skip_special_tokens=False)


def sampled(chat_format: ChatFormat, text: str) -> SampledAction:
    """The action of a policy that continues the prompt with `text`."""
    ids = tuple(chat_format.tokenizer.encode(text, add_special_tokens=False))
    return SampledAction(ids, (-0.1,) * len(ids), (VersionSpan(0, len(ids), 0),), SamplingParams(), "end")


def start(chat_format: ChatFormat, video) -> ZoomEnv:
    env = ZoomEnv(EpisodeId(0, "t", 0), Task("t", "v.mp4", "What flashes?", "B"), video, chat_format, EpisodeConfig())
    env.start(make_clip([0.0, 2.0], width=64, height=32))
    return env


@pytest.mark.parametrize(("chat_template", "thinking", "prefix"), CASES)
def test_prompt_ends_with_the_templates_prefix(make_format, chat_template, thinking, prefix):
    chat_format = make_format(chat_template, thinking)
    prompt = chat_format.encode_prompt("What flashes?", make_clip([0.3, 2.0], width=64, height=32).frames)
    text = decode(chat_format, prompt.compact_ids)
    assert text.endswith(f"<|im_start|>assistant\n{prefix}")
    assert (chat_format.turn_prefix, chat_format.opens_reasoning) == (prefix, prefix == OPEN)
    assert f"<0.3 seconds>{IMAGE_SLOT}<2.0 seconds>{IMAGE_SLOT}" in text
    assert text.count("<|im_start|>system\n") == 1
    assert [GRID.num_visual_tokens(grid) for grid in prompt.grids] == [2, 2]


@pytest.mark.parametrize(("chat_template", "thinking", "prefix"), CASES)
def test_observations_continue_the_sampled_ids(make_format, video, chat_template, thinking, prefix):
    """Every prompt starts with the previous prompt and the sampled ids; no reasoning is removed."""
    chat_format = make_format(chat_template, thinking)
    env, conversation = start(chat_format, video), ()
    first = f"Blue at 9 s.</think>\n\n{CALL}" if prefix == OPEN else f"<think>Blue at 9 s.</think>{CALL}"
    conversation = env.prompt.compact_ids
    for text in (first, first.replace('"fps": 1', '"fps": 99')):
        action = sampled(chat_format, text)
        zoom = env.step(action)
        if zoom is not None:
            env.add_clip(make_clip([8.0, 9.0, 10.0, 11.0], zoom, width=64, height=32))
        expected = (*conversation, *action.token_ids)
        conversation = env.prompt.compact_ids
        assert conversation[: len(expected)] == expected
        observation = decode(chat_format, conversation[len(expected) :])
        assert observation.startswith("<|im_end|>\n<|im_start|>user\n<tool_response>\n")
        assert observation.endswith(f"<|im_end|>\n<|im_start|>assistant\n{prefix}")
    assert decode(chat_format, conversation).count("Blue at 9 s.") == 2
    assert [type(turn.zoom).__name__ for turn in env.turns] == ["ZoomRequest", "RejectedZoom"]


@pytest.mark.parametrize(("chat_template", "thinking", "prefix"), CASES)
def test_turns_are_well_formed(make_format, video, chat_template, thinking, prefix):
    """The text of a turn includes the tag that the prompt opened, so that rewards read the same format."""
    chat_format = make_format(chat_template, thinking)
    env = start(chat_format, video)
    before = "" if prefix == OPEN else "<think>"
    zoom = env.step(sampled(chat_format, f"{before}Closer.</think>\n\n{CALL}"))
    assert zoom == ZoomRequest(8.0, 12.0, 1.0)
    env.add_clip(make_clip([8.0, 9.0, 10.0, 11.0], zoom, width=64, height=32))
    env.step(sampled(chat_format, f"{before}Seen.</think>\n\n<answer>B</answer><|im_end|>"))
    trajectory = env.trajectory()
    assert (trajectory.status, trajectory.answer) == (EpisodeStatus.ANSWERED, "B")
    assert is_well_formed([turn.text for turn in trajectory.turns])
    assert len(trajectory.loss_mask) == len(trajectory.expanded_ids)
    assert sum(trajectory.loss_mask) == sum(len(turn.action.token_ids) for turn in trajectory.turns)


@pytest.mark.parametrize(("chat_template", "thinking", "prefix"), CASES)
@pytest.mark.parametrize("text", ["<think>Seen.</think><answer>B</answer>", "<answer>B</answer>"])
def test_external_turn_continues_the_prompt(make_format, chat_template, thinking, prefix, text):
    """A prompt and an external turn contain each reasoning tag once."""
    chat_format = make_format(chat_template, thinking)
    turn = decode(chat_format, chat_format.encode_assistant(text))
    has_reasoning = text.startswith("<think>")
    if prefix == OPEN:
        expected = "Seen.</think><answer>B</answer>" if has_reasoning else "\n</think>\n\n<answer>B</answer>"
    else:
        expected = text
    assert turn == f"{expected}<|im_end|>"
    read = chat_format.decode_turn(chat_format.encode_assistant(text))
    assert read.endswith("<answer>B</answer>")
    assert read.count("<think>") == read.count("</think>") == int(has_reasoning or prefix == OPEN)


@pytest.mark.parametrize(("chat_template", "thinking", "prefix"), CASES)
def test_trajectory_survives_the_sft_format(make_format, video, chat_template, thinking, prefix):
    chat_format = make_format(chat_template, thinking)
    env = start(chat_format, video)
    before = "" if prefix == OPEN else "<think>"
    zoom = env.step(sampled(chat_format, f"{before}Closer.</think>\n\n{CALL}"))
    clip = make_clip([8.0, 9.0, 10.0, 11.0], zoom, width=64, height=32)
    env.add_clip(clip)
    env.step(sampled(chat_format, f"{before}Seen.</think>\n\n<answer>B</answer><|im_end|>"))
    trajectory = env.trajectory()
    sample = trajectory_to_sample(trajectory, chat_format, lambda ref: ref.digest)
    answers = [message["content"] for message in sample["messages"] if message["role"] == "assistant"]
    assert answers == [turn.text for turn in trajectory.turns]
    frames = [*make_clip([0.0, 2.0], width=64, height=32).frames, *clip.frames]
    restored = sample_to_trajectory(sample, frames, chat_format, "s")
    assert restored.expanded_ids == trajectory.expanded_ids
    assert restored.loss_mask == trajectory.loss_mask


@pytest.mark.parametrize(("chat_template", "thinking", "prefix"), CASES)
def test_history_rounds_are_complete(make_format, chat_template, thinking, prefix):
    chat_format = make_format(chat_template, thinking)
    chat = ChatHistory("", (("What flashes?", "a disc"),))
    messages = chat_format.build_messages("What flashes?", "Which colour?", chat)
    text = decode(chat_format, chat_format.encode_messages(messages, ()).compact_ids)
    assert "<answer>a disc</answer><|im_end|>\n<|im_start|>user\nWhich colour?<|im_end|>" in text
    assert text.endswith(f"<|im_start|>assistant\n{prefix}")


def test_default_system_prompt_is_the_templates(make_format):
    def render(chat_template: str) -> str:
        chat_format = make_format(chat_template)
        return decode(chat_format, chat_format.encode_messages([("user", "q")], ()).compact_ids)

    assert render(QWEN2_5_VL).startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    for chat_template in (QWEN3_VL_INSTRUCT, QWEN3_VL_THINKING, QWEN3_5):
        assert render(chat_template).startswith("<|im_start|>user\nq<|im_end|>\n")


def test_observation_that_is_a_tool_response(make_format):
    """Templates treat a user turn that consists of a tool response differently; the observation must not change."""
    for chat_template in (QWEN3_VL_THINKING, QWEN3_5):
        chat_format = make_format(chat_template)
        observation = chat_format.encode_observation("<tool_response>x</tool_response>", (), end_sampled=True)
        expected = "\n<|im_start|>user\n<tool_response>x</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n"
        assert decode(chat_format, observation.compact_ids) == expected


def test_names_differ_by_thinking_mode(make_format):
    on, off, auto = (make_format(QWEN3_5, thinking).name for thinking in ("on", "off", "auto"))
    assert on == auto != off


def test_prompt_file_overrides_the_frame_text(make_format):
    frames = make_clip([0.5]).frames
    assert make_format(QWEN3_5).format_frames(frames) == f"<0.5 seconds>{IMAGE_SLOT}"
    assert make_format(QWEN3_5, frame="{image}{time:.2f}").format_frames(frames) == f"{IMAGE_SLOT}0.50"


def test_quoted_call_in_open_reasoning_is_no_call(make_format, video):
    env = start(make_format(QWEN3_VL_THINKING), video)
    assert env.step(sampled(env.chat_format, f"I could write {CALL} or <answer>A</answer>.<|im_end|>")) is None
    assert (env.status, env.answer, env.turns[0].zoom) == (EpisodeStatus.NO_ANSWER, None, None)


def test_quoted_call_before_the_call_is_ignored(make_format, video):
    env = start(make_format(QWEN3_VL_THINKING), video)
    quoted = CALL.replace("8", "1")
    zoom = env.step(sampled(env.chat_format, f"Not {quoted}, <video_zoom> or <answer>.</think>\n\n{CALL}"))
    assert zoom == ZoomRequest(8.0, 12.0, 1.0)


@pytest.mark.parametrize(("chat_template", "thinking", "prefix"), CASES)
def test_gate_prefix_continues_the_prompt(make_format, chat_template, thinking, prefix):
    chat_format = make_format(chat_template, thinking)
    forced, options = forced_prefix(chat_format, "<think></think><answer>", ("A", "B"))
    text = chat_format.decode_turn(forced)
    assert text.count("<think>") == text.count("</think>") == 1
    assert text.endswith("<answer>")
    assert len(options) == 2
