"""The SFT layout, both ways: what is written is read back as the same tokens and frames."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from vz_ray.config.data import SynthConfig
from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.sft_file import (
    SampleEncodingError,
    SftFile,
    fold_turns_into_prompt,
    sample_to_trajectory,
    trajectory_to_sample,
)
from vz_ray.data.task_file import read_tasks
from vz_ray.env.chat_format import ChatFormat, PromptTemplate
from vz_ray.env.trajectory import ExternalAction
from vz_ray.learner.batch import collate, in_memory_pixels
from vz_ray.learner.example import SpecialTokenIds, encode_trajectory
from vz_ray.learner.image_patches import ImageSpec
from vz_ray.learner.packing import PrefixTree
from vz_ray.learner.policy_model import PolicyModel
from vz_ray.needle.base_training import make_tokenizer_corpus
from vz_ray.needle.exemplars import collect_exemplars, zoom_oracle_factory
from vz_ray.needle.synthesis import synthesize
from vz_ray.needle.tiny_model import build_tiny_model
from vz_ray.utils.errors import UserError
from vz_ray.video.frame import FrameSize
from vz_ray.video.image_encoding import encode_image
from vz_ray.video.local_source import LocalFrameSource

RULES = EpisodeConfig(
    prompt="conf/prompt/tiny.yaml", max_zoom_frames=8, max_images=64, max_context=2048,
    overview_frames=8, min_pixels=784, max_pixels=784,
)  # fmt: skip
SIZE = FrameSize(784, 784)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model", make_tokenizer_corpus())


@pytest.fixture(scope="module", params=["clean", "compat"])
def wire(request, checkpoint):
    from transformers import AutoTokenizer

    compat = request.param == "compat"
    wording = "conf/prompt/compat.yaml" if compat else RULES.prompt
    return ChatFormat(AutoTokenizer.from_pretrained(checkpoint), PromptTemplate.load(wording), compat=compat)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    config = SynthConfig(
        directory=str(tmp_path_factory.mktemp("needle")), train=1, sft=0, validation=0, test=0, shot_s=[4],
        workers=1,
    )  # fmt: skip
    return read_tasks(synthesize(config)["train"])


@pytest.fixture(scope="module")
def played(world, wire):
    """Episodes, and their frames by digest."""
    rules = replace(RULES, chat_format="compat" if wire.compat else "clean", max_context=8192)
    with LocalFrameSource() as frames:
        exemplars = asyncio.run(collect_exemplars(world, frames, wire, rules, zoom_oracle_factory(wire)))
        refs = [ref for trajectory in exemplars for ref in trajectory.frame_refs]
        found = asyncio.run(_resolved(frames, refs))
    return exemplars, {frame.ref.digest: frame for frame in found}


async def _resolved(frames, refs):
    return await frames.resolve(refs)


def read_sft(path, wire):
    """The trajectories of a file."""
    with LocalFrameSource() as frames:
        return asyncio.run(SftFile.load(path).load_trajectories(wire, SIZE, frames))


def write(folder, trajectories, frames, wire, given=0):
    """A file of the layout with its images; its path."""
    for digest, frame in frames.items():
        (folder / f"{digest}.png").write_bytes(encode_image(frame.rgb))
    samples = [
        trajectory_to_sample(t, wire, lambda ref: f"{ref.digest}.png", num_context_turns=given)
        for t in trajectories
    ]
    (folder / "sft.json").write_text(json.dumps(samples, ensure_ascii=False))
    return folder / "sft.json"


def test_a_sample_has_one_mark_for_each_frame_and_the_turns_as_they_were_said(played, wire):
    for trajectory in played[0]:
        sample = trajectory_to_sample(trajectory, wire, lambda ref: ref.digest)
        roles = [message["role"] for message in sample["messages"]]
        assert roles == ["system", *["user", "assistant"] * len(trajectory.turns)]
        said = [m["content"] for m in sample["messages"] if m["role"] == "assistant"]
        assert said == [turn.text for turn in trajectory.turns]
        marks = [m["content"].count("<image>") for m in sample["messages"] if m["role"] == "user"]
        assert marks == [len(context.refs) for context in trajectory.contexts]
        assert sample["images"] == [ref.digest for ref in trajectory.refs]
        assert not re.search(r"<\|\w+\|>", json.dumps(sample))


def test_samples_with_and_without_weights_make_one_table(played, wire):
    """As tools see them that read the file into Arrow: no column changes its type from record to record."""
    samples = [
        trajectory_to_sample(t, wire, lambda ref: ref.digest, num_context_turns=i % 2)
        for i, t in enumerate(played[0])
    ]
    messages = pa.Table.from_pylist(samples).column("messages")
    assert {field.name for field in messages.type.value_type} == {"role", "content", "weight"}
    assert {m["weight"] for sample in messages.to_pylist() for m in sample} == {0, None}


def test_what_was_written_is_read_back_as_the_same_tokens_frames_and_turns(played, wire, tmp_path):
    trajectories, frames = played
    again = read_sft(write(tmp_path, trajectories, frames, wire), wire)
    for before, after in zip(trajectories, again, strict=True):
        assert after.expanded_ids == before.expanded_ids
        assert after.loss_mask == before.loss_mask
        assert after.grids == before.grids
        assert after.answer == before.answer
        assert after.zooms == tuple(replace(zoom, inclusive=False) for zoom in before.zooms)
        assert [ref.digest for ref in after.frame_refs] == [ref.digest for ref in before.refs]


def test_turns_of_weight_0_are_read_and_not_learned_from(played, wire, tmp_path):
    trajectories, frames = played
    several = [t for t in trajectories if len(t.turns) > 1]
    assert several
    again = read_sft(write(tmp_path, several, frames, wire, given=1), wire)
    for before, after in zip(several, again, strict=True):
        assert after.expanded_ids == before.expanded_ids
        assert after.loss_mask == fold_turns_into_prompt(before, 1).loss_mask
        assert sum(after.loss_mask) < sum(before.loss_mask)


def test_a_turn_of_weight_0_in_the_middle_is_part_of_what_comes_before_the_next(wire):
    text = {"messages": [{"role": "user", "content": "Q"}], "images": []}
    for number, weight in enumerate((1, 0, 1)):
        said = {
            "role": "assistant",
            "content": f"<think>{number}</think><answer>A</answer>",
            "weight": weight,
        }
        text["messages"] += [said, {"role": "user", "content": "on"}]
    text["messages"].pop()
    found = sample_to_trajectory(text, [], wire, "t")
    assert [turn.text[7] for turn in found.turns] == ["0", "2"]
    learned = [i for i, m in zip(found.expanded_ids, found.loss_mask, strict=True) if m]
    assert wire.tokenizer.decode(learned).count("<answer>") == 2
    assert wire.tokenizer.decode(list(found.expanded_ids)).count("<answer>") == 3


def test_the_learner_s_loss_of_a_file_is_that_of_the_episodes(played, wire, checkpoint, tmp_path):
    trajectories, frames = played
    again = read_sft(write(tmp_path, trajectories[:2], frames, wire), wire)
    with LocalFrameSource() as source:
        images = asyncio.run(_resolved(source, [ref for t in again for ref in t.frame_refs]))
    policy, spec = PolicyModel.from_pretrained(checkpoint), ImageSpec.from_pretrained(checkpoint)
    tokens = SpecialTokenIds.from_pretrained(checkpoint)

    def logprobs(some, pixels):
        examples = [encode_trajectory(t, tokens, spec.merge_size) for t in some]
        trees = [PrefixTree.from_members([0, 1], examples)]
        batch = collate(trees, examples, in_memory_pixels(pixels), tokens, spec, torch.device("cpu"))
        with torch.no_grad():
            return (policy(batch)[0] * batch.mask).numpy()

    before = logprobs(trajectories[:2], {digest: frame.rgb for digest, frame in frames.items()})
    after = logprobs(again, {frame.ref.digest: frame.rgb for frame in images})
    np.testing.assert_array_equal(before, after)


USER, SAID = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "<answer>A</answer>"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "expected an object, found list"),
        ({"images": []}, "'messages' must be a list"),
        ({"messages": [USER, {"role": "tool", "content": ""}]}, "message 1 needs a role of system"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, SAID]}, "a text as content"),
        ({"messages": [{"role": "user", "content": "<image>"}, SAID]}, "1 <image> in messages for 0 images"),
        ({"messages": [USER, USER, SAID]}, "must take turns"),
        ({"messages": [USER]}, "must take turns"),
        ({"messages": [{"role": "system", "content": "S"}]}, "must take turns"),
        ({"messages": [USER, {**SAID, "weight": 0}]}, "one to learn from"),
        ({"messages": [{"role": "user", "content": "<|image_pad|>"}, SAID]}, "control token"),
        (
            {"messages": [{**USER, "content": "<image>"}, SAID], "images": ["gone.png"]},
            r"no image .*gone\.png",
        ),
        ({"messages": [{**USER, "content": "<image>"}, SAID], "images": ["sft.json"]}, r"sft\.json"),
        ({"messages": [USER, SAID], "images": [3]}, "'images' must be a list of paths"),
        ({"messages": [USER, SAID], "images": "a.png"}, "'images' must be a list of paths"),
    ],
)
def test_a_record_of_another_layout_is_named(wire, tmp_path, record, message):
    path = tmp_path / "sft.json"
    path.write_text(json.dumps([{"messages": [USER, SAID]}, record]))
    with pytest.raises(UserError, match=message) as caught:
        read_sft(path, wire)
    assert "record 1" in str(caught.value)


def test_a_record_on_each_line_does_as_well_as_a_list_of_them(played, wire, tmp_path):
    path = write(tmp_path, *played, wire)
    lines = "".join(json.dumps(record) + "\n" for record in json.loads(path.read_text()))
    (tmp_path / "lines.jsonl").write_text(f"{lines}\n")
    listed, lined = read_sft(path, wire), read_sft(tmp_path / "lines.jsonl", wire)
    assert [t.expanded_ids for t in lined] == [t.expanded_ids for t in listed]
    assert [t.id.task_id for t in lined] == [f"lines-{i}" for i in range(len(listed))]


@pytest.mark.parametrize("text", ["[]", "{}", "[", '"x"'])
def test_a_file_that_holds_no_samples_is_named(wire, tmp_path, text):
    (tmp_path / "sft.json").write_text(text)
    with pytest.raises(UserError, match=r"sft\.json"):
        read_sft(tmp_path / "sft.json", wire)


def test_a_text_with_a_mark_of_its_own_cannot_be_written(played, wire):
    one = played[0][0]
    text = "<think>an <image></think><answer>A</answer>"
    turn = replace(one.turns[-1], action=ExternalAction(text, wire.written(text)), text=text)
    with pytest.raises(SampleEncodingError, match="<image>"):
        trajectory_to_sample(replace(one, turns=(*one.turns[:-1], turn)), wire, lambda ref: ref.digest)
