"""Exact text and tokens of the chat formats."""

from __future__ import annotations

import re
from dataclasses import asdict, replace

import pytest
import yaml

from tests.env.conftest import make_clip
from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.chat_format_loader import load_chat_format
from vz_ray.env.chat_format import ChatFormat, PromptTemplate
from vz_ray.env.task import ChatHistory
from vz_ray.env.trajectory import TokenContext
from vz_ray.utils.errors import UserError
from vz_ray.video.frame import FrameRef
from vz_ray.video.subtitles import Subtitle

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
FRAMES = f"<frame0_time8.00s>{IMAGE}<frame1_time9.50s>{IMAGE}"


def text_of(chat_format, context) -> str:
    return chat_format.tokenizer.decode(list(context.compact_ids), skip_special_tokens=False)


def test_compat_frames_have_no_separator(compat_chat_format):
    assert compat_chat_format.format_frames(make_clip([8.0, 9.5]).frames) == FRAMES


def test_compat_observation_after_zoom(compat_chat_format):
    frames = make_clip([8.0, 9.5]).frames
    observation = compat_chat_format.encode_observation(
        compat_chat_format.format_clip(frames, last_round=False), frames, end_sampled=False
    )
    assert text_of(compat_chat_format, observation) == (
        "<|im_end|><|im_start|>user\n<tool_response>\nThe frames of the video clip are shown below:\n"
        + FRAMES
        + "\n</tool_response>\ncontinue your reasoning process inside <think> and </think> and then "
        "write your final answer inside <answer> and </answer><|im_end|>\n<|im_start|>assistant\n"
    )


def test_compat_notice_before_last_round(compat_chat_format):
    text = compat_chat_format.format_clip((), last_round=True)
    assert text.endswith(
        "</answer>Do not call <video_zoom> in this round, give a final answer based on information above."
    )


def test_compat_observation_after_rejected_zoom(compat_chat_format):
    observation = compat_chat_format.encode_observation(
        compat_chat_format.format_error("oops", last_round=False), (), end_sampled=True
    )
    assert text_of(compat_chat_format, observation) == (
        "<|im_start|>user\n<tool_response>\nERROR occurs during the function tool call. "
        "Error Information: oops.\n</tool_response>\nPlease analyze the error information obtained from the "
        "function tool and adjust your response. Countinue your reasoning process inside <think> and "
        "</think>.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_compat_decode_error(compat_chat_format):
    text = compat_chat_format.format_error("oops", last_round=False, decode=True)
    assert text.startswith("<tool_response>\nError: oops<tool_response>Please analyze the error information")


def test_question_containing_image_pad_is_rejected(chat_format):
    with pytest.raises(UserError, match="3 image slots for 2 frames"):
        chat_format.encode_prompt("what is <|image_pad|>?", make_clip([8.0, 9.5]).frames)


def test_braces_in_question_are_preserved(chat_format):
    assert "{x} {frames}" in chat_format.format_question("{x} {frames}", ())


def test_invalid_prompt_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist"):
        PromptTemplate.load(tmp_path / "nowhere.yaml")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("systm: hello\n")
    with pytest.raises(UserError, match="systm"):
        PromptTemplate.load(wrong)


def test_subtitles_are_placed_between_frames(chat_format):
    frames = make_clip([0.0, 10.0]).frames
    subtitles = [Subtitle(0.0, 4.0, "hello {you}"), Subtitle(9.0, 20.0, "bye")]
    assert chat_format.format_frames(frames, subtitles) == f"{IMAGE}0.00\nhello {{you}}\n{IMAGE}10.00\nbye\n"


def test_question_images_follow_the_overview(chat_format):
    overview, picture = make_clip([0.0, 8.0]).frames, make_clip([3.0], width=56).frames
    text = chat_format.format_question("What is this?", overview, question_images=picture)
    context = chat_format.encode_messages(chat_format.build_messages(text, "", ChatHistory()), (*overview, *picture))
    assert [ref.pts_s for ref in context.frame_refs] == [0.0, 8.0, 3.0]
    assert (
        chat_format.format_question("What?", overview, question_images=picture)
        == f"{IMAGE}0.00{IMAGE}8.00{IMAGE}\nWhat?"
    )


def test_name_depends_on_the_template(chat_format, compat_chat_format):
    assert chat_format.name.startswith("clean-")
    assert compat_chat_format.name.startswith("compat-")
    assert chat_format.name != compat_chat_format.name


def test_frame_template_is_configurable(chat_format):
    template = replace(chat_format.template, frame="{number}:{image}{time:.1f}")
    custom = ChatFormat(chat_format.tokenizer, template, grid=chat_format.grid)
    assert custom.format_frames(make_clip([8.0, 9.5]).frames) == f"0:{IMAGE}8.01:{IMAGE}9.5"
    assert custom.name != chat_format.name


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("frame", "{image}", "lacks {time}"),
        ("frame", "{image}{when}", "is not a valid template"),
        ("question", "{question}", "lacks {frames}"),
        ("refusal", "{", "is not a valid template"),
        ("reply", None, "must be a text"),
    ],
)
def test_invalid_template_field_is_rejected(tmp_path, chat_format, key, text, message):
    path = tmp_path / "prompt.yaml"
    path.write_text(yaml.safe_dump(asdict(chat_format.template) | {key: text}))
    with pytest.raises(UserError, match=f"{key} .*{re.escape(message)}"):
        PromptTemplate.load(path)


def test_context_with_mismatched_images_is_rejected() -> None:
    with pytest.raises(ValueError, match="1 image slots and 0 image grids for 0 frames"):
        TokenContext((5, 7, 6), pad_id=7)


def test_context_expands_pads_to_visual_tokens() -> None:
    refs = (FrameRef("v", "v.mp4", 0, 0.0, 56, 28, "bicubic", "av", "00"),) * 2
    context = TokenContext((5, 7, 6, 7), ((1, 2, 4), (1, 4, 4)), refs, pad_id=7, merge_size=2)
    assert context.expanded_ids == (5, 7, 7, 6, 7, 7, 7, 7)
    assert context.num_tokens == len(context.expanded_ids)


def test_context_with_images_needs_a_merge_size() -> None:
    ref = FrameRef("v", "v.mp4", 0, 0.0, 56, 28, "bicubic", "av", "00")
    with pytest.raises(ValueError, match="merge_size is 0"):
        TokenContext((5, 7), ((1, 2, 4),), (ref,), pad_id=7)


@pytest.mark.parametrize(("compat", "name"), [(False, "clean-94cf9620966d"), (True, "compat-93572e4e812f")])
def test_names_of_qwen2_5_vl_are_stable(compat, name) -> None:
    """Records and SFT data refer to the name; it must not change for Qwen2.5-VL."""
    episode = EpisodeConfig(
        chat_format="compat" if compat else "clean", prompt=f"conf/prompt/{'compat' if compat else 'zoom'}.yaml"
    )
    assert load_chat_format("assets/tiny-base", episode).name == name


def test_template_needs_the_text_of_a_frame(chat_format) -> None:
    with pytest.raises(UserError, match="no key frame"):
        ChatFormat(chat_format.tokenizer, replace(chat_format.template, frame=""), grid=chat_format.grid)
