"""SFT files: a round trip preserves tokens, frames and loss masks."""

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
from vz_ray.data.chat_format_loader import load_chat_format
from vz_ray.data.sft_file import (
    SampleEncodingError,
    SftFile,
    fold_turns_into_prompt,
    sample_to_trajectory,
    trajectory_to_sample,
)
from vz_ray.data.task_file import read_tasks
from vz_ray.env.trajectory import ExternalAction
from vz_ray.learner.batch import collate
from vz_ray.learner.example import SpecialTokenIds, encode_trajectory
from vz_ray.learner.image_inputs import in_memory_pixels
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

CONFIG = EpisodeConfig(
    prompt="conf/prompt/tiny.yaml", max_zoom_frames=8, max_images=64, max_context=2048,
    overview_frames=8, min_pixels=784, max_pixels=784,
)  # fmt: skip
SIZE = FrameSize(784, 784, 28)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model", make_tokenizer_corpus())


@pytest.fixture(scope="module", params=["clean", "compat"])
def chat_format(request, checkpoint):
    prompt = "conf/prompt/compat.yaml" if request.param == "compat" else CONFIG.prompt
    return load_chat_format(checkpoint, replace(CONFIG, prompt=prompt, chat_format=request.param))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    config = SynthConfig(
        directory=str(tmp_path_factory.mktemp("needle")), train=1, sft=0, validation=0, test=0, shot_s=[4],
        workers=1,
    )  # fmt: skip
    return read_tasks(synthesize(config)["train"])


@pytest.fixture(scope="module")
def exemplars(tasks, chat_format):
    """Collect episodes, and their frames by digest."""
    config = replace(CONFIG, chat_format="compat" if chat_format.compat else "clean", max_context=8192)
    with LocalFrameSource() as frames:
        trajectories = asyncio.run(
            collect_exemplars(tasks, frames, chat_format, config, zoom_oracle_factory(chat_format))
        )
        refs = [ref for trajectory in trajectories for ref in trajectory.frame_refs]
        resolved = asyncio.run(_resolve(frames, refs))
    return trajectories, {frame.ref.digest: frame for frame in resolved}


async def _resolve(frames, refs):
    return await frames.resolve(refs)


def read_sft(path, chat_format):
    """Read the trajectories of a file."""
    with LocalFrameSource() as frames:
        return asyncio.run(SftFile.load(path).load_trajectories(chat_format, SIZE, frames))


def write_sft(folder, trajectories, frames, chat_format, num_context_turns=0):
    """Write an SFT file with its images, and return its path."""
    for digest, frame in frames.items():
        (folder / f"{digest}.png").write_bytes(encode_image(frame.rgb))
    samples = [
        trajectory_to_sample(t, chat_format, lambda ref: f"{ref.digest}.png", num_context_turns=num_context_turns)
        for t in trajectories
    ]
    (folder / "sft.json").write_text(json.dumps(samples, ensure_ascii=False))
    return folder / "sft.json"


def test_sample_has_one_marker_per_frame(exemplars, chat_format):
    for trajectory in exemplars[0]:
        sample = trajectory_to_sample(trajectory, chat_format, lambda ref: ref.digest)
        roles = [message["role"] for message in sample["messages"]]
        assert roles == ["system", *["user", "assistant"] * len(trajectory.turns)]
        answers = [m["content"] for m in sample["messages"] if m["role"] == "assistant"]
        assert answers == [turn.text for turn in trajectory.turns]
        num_markers = [m["content"].count("<image>") for m in sample["messages"] if m["role"] == "user"]
        assert num_markers == [len(context.frame_refs) for context in trajectory.contexts]
        assert sample["images"] == [ref.digest for ref in trajectory.frame_refs]
        assert not re.search(r"<\|\w+\|>", json.dumps(sample))


def test_samples_with_and_without_weights_have_one_schema(exemplars, chat_format):
    """Tools that read the file into Arrow need the same column types in all records."""
    samples = [
        trajectory_to_sample(t, chat_format, lambda ref: ref.digest, num_context_turns=i % 2)
        for i, t in enumerate(exemplars[0])
    ]
    messages = pa.Table.from_pylist(samples).column("messages")
    assert {field.name for field in messages.type.value_type} == {"role", "content", "weight"}
    assert {m["weight"] for sample in messages.to_pylist() for m in sample} == {0, None}


def test_round_trip_preserves_tokens_frames_and_turns(exemplars, chat_format, tmp_path):
    trajectories, frames = exemplars
    restored = read_sft(write_sft(tmp_path, trajectories, frames, chat_format), chat_format)
    for before, after in zip(trajectories, restored, strict=True):
        assert after.expanded_ids == before.expanded_ids
        assert after.loss_mask == before.loss_mask
        assert after.grids == before.grids
        assert after.answer == before.answer
        assert after.zooms == tuple(replace(zoom, inclusive=False) for zoom in before.zooms)
        assert [ref.digest for ref in after.frame_refs] == [ref.digest for ref in before.frame_refs]


def test_turns_of_weight_0_are_excluded_from_the_loss(exemplars, chat_format, tmp_path):
    trajectories, frames = exemplars
    multi_turn = [t for t in trajectories if len(t.turns) > 1]
    assert multi_turn
    restored = read_sft(write_sft(tmp_path, multi_turn, frames, chat_format, num_context_turns=1), chat_format)
    for before, after in zip(multi_turn, restored, strict=True):
        assert after.expanded_ids == before.expanded_ids
        assert after.loss_mask == fold_turns_into_prompt(before, 1).loss_mask
        assert sum(after.loss_mask) < sum(before.loss_mask)


def test_middle_turn_of_weight_0_becomes_context(chat_format):
    sample = {"messages": [{"role": "user", "content": "Q"}], "images": []}
    for number, weight in enumerate((1, 0, 1)):
        answer = {
            "role": "assistant",
            "content": f"<think>{number}</think><answer>A</answer>",
            "weight": weight,
        }
        sample["messages"] += [answer, {"role": "user", "content": "continue"}]
    sample["messages"].pop()
    trajectory = sample_to_trajectory(sample, [], chat_format, "t")
    assert [turn.text[7] for turn in trajectory.turns] == ["0", "2"]
    loss_ids = [i for i, m in zip(trajectory.expanded_ids, trajectory.loss_mask, strict=True) if m]
    assert chat_format.tokenizer.decode(loss_ids).count("<answer>") == 2
    assert chat_format.tokenizer.decode(list(trajectory.expanded_ids)).count("<answer>") == 3


def test_logprobs_of_file_equal_those_of_the_episodes(exemplars, chat_format, checkpoint, tmp_path):
    trajectories, frames = exemplars
    restored = read_sft(write_sft(tmp_path, trajectories[:2], frames, chat_format), chat_format)
    with LocalFrameSource() as source:
        images = asyncio.run(_resolve(source, [ref for t in restored for ref in t.frame_refs]))
    policy, spec = PolicyModel.from_pretrained(checkpoint), ImageSpec.from_pretrained(checkpoint)
    tokens = SpecialTokenIds.from_pretrained(checkpoint)

    def logprobs(trajectories, pixels):
        examples = [encode_trajectory(t, tokens, spec.merge_size) for t in trajectories]
        trees = [PrefixTree.from_members([0, 1], examples)]
        batch = collate(trees, examples, in_memory_pixels(pixels), tokens, spec, torch.device("cpu"))
        with torch.no_grad():
            return (policy(batch)[0] * batch.mask).numpy()

    before = logprobs(trajectories[:2], {digest: frame.rgb for digest, frame in frames.items()})
    after = logprobs(restored, {frame.ref.digest: frame.rgb for frame in images})
    np.testing.assert_array_equal(before, after)


USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "<answer>A</answer>"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "expected an object, got list"),
        ({"images": []}, "'messages' must be a list"),
        ({"messages": [USER, {"role": "tool", "content": ""}]}, r"message 1 needs a role \(system"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, ASSISTANT]}, "a text as content"),
        (
            {"messages": [{"role": "user", "content": "<image>"}, ASSISTANT]},
            "1 <image> in messages for 0 images",
        ),
        ({"messages": [USER, USER, ASSISTANT]}, "must alternate"),
        ({"messages": [USER]}, "must alternate"),
        ({"messages": [{"role": "system", "content": "S"}]}, "must alternate"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "without weight 0"),
        ({"messages": [{"role": "user", "content": "<|image_pad|>"}, ASSISTANT]}, "control token"),
        (
            {"messages": [{**USER, "content": "<image>"}, ASSISTANT], "images": ["missing.png"]},
            r"no image .*missing\.png",
        ),
        ({"messages": [{**USER, "content": "<image>"}, ASSISTANT], "images": ["sft.json"]}, r"sft\.json"),
        ({"messages": [USER, ASSISTANT], "images": [3]}, "'images' must be a list of paths"),
        ({"messages": [USER, ASSISTANT], "images": "a.png"}, "'images' must be a list of paths"),
    ],
)
def test_invalid_record_is_named(chat_format, tmp_path, record, message):
    path = tmp_path / "sft.json"
    path.write_text(json.dumps([{"messages": [USER, ASSISTANT]}, record]))
    with pytest.raises(UserError, match=message) as raised:
        read_sft(path, chat_format)
    assert "record 1" in str(raised.value)


def test_json_lines_are_read_like_a_list(exemplars, chat_format, tmp_path):
    path = write_sft(tmp_path, *exemplars, chat_format)
    json_lines = "".join(json.dumps(record) + "\n" for record in json.loads(path.read_text()))
    (tmp_path / "lines.jsonl").write_text(f"{json_lines}\n")
    from_list, from_lines = read_sft(path, chat_format), read_sft(tmp_path / "lines.jsonl", chat_format)
    assert [t.expanded_ids for t in from_lines] == [t.expanded_ids for t in from_list]
    assert [t.id.task_id for t in from_lines] == [f"lines-{i}" for i in range(len(from_list))]


@pytest.mark.parametrize("text", ["[]", "{}", "[", '"x"'])
def test_file_without_samples_is_named(chat_format, tmp_path, text):
    (tmp_path / "sft.json").write_text(text)
    with pytest.raises(UserError, match=r"sft\.json"):
        read_sft(tmp_path / "sft.json", chat_format)


def test_text_with_the_image_marker_is_rejected(exemplars, chat_format):
    trajectory = exemplars[0][0]
    text = "<think>an <image></think><answer>A</answer>"
    turn = replace(trajectory.turns[-1], action=ExternalAction(text, chat_format.encode_assistant(text)), text=text)
    with pytest.raises(SampleEncodingError, match="<image>"):
        trajectory_to_sample(
            replace(trajectory, turns=(*trajectory.turns[:-1], turn)), chat_format, lambda ref: ref.digest
        )
