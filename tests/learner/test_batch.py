"""Collation of trajectories and the policy model's forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.learner.training_data import TrainingData, make_training_data
from vz_ray.env.trajectory import ExternalAction, TokenContext, Trajectory, Turn
from vz_ray.learner.batch import MicroBatch, collate
from vz_ray.learner.example import Example, encode_trajectory
from vz_ray.learner.image_inputs import in_memory_pixels
from vz_ray.learner.image_patches import ImageSpec
from vz_ray.learner.packing import PrefixTree
from vz_ray.learner.policy_model import PolicyModel, check_hf_checkpoint, load_pretrained
from vz_ray.utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(family_model: Path) -> TrainingData:
    return make_training_data(family_model, groups=2, samples=3, overview=3, clip=2, sides=(1, 2))


@pytest.fixture(scope="module")
def policy(data: TrainingData) -> PolicyModel:
    return PolicyModel.from_pretrained(data.model, chunk=7)


@pytest.fixture(scope="module")
def spec(data: TrainingData) -> ImageSpec:
    return ImageSpec.from_pretrained(data.model)


@pytest.fixture(scope="module")
def examples(data: TrainingData, policy: PolicyModel) -> list[Example]:
    return [encode_trajectory(t, policy.tokens, policy.shape.vision.merge_size) for t in data.trajectories]


def build_batch(
    indices: Iterable[int],
    examples: list[Example],
    data: TrainingData,
    policy: PolicyModel,
    spec: ImageSpec,
    **options: bool,
) -> MicroBatch:
    """Pack trajectories without sharing prefixes."""
    trees = [PrefixTree.from_members([index], examples) for index in indices]
    return collate(trees, examples, in_memory_pixels(data.pixels), policy.tokens, spec, CPU, **options)


def gradients(policy: PolicyModel, batches: list[MicroBatch]) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    policy.zero_grad()
    rows = []
    for batch in batches:
        logprobs, entropy = policy(batch)
        (logprobs.sum() + 0.1 * entropy.sum()).backward()
        rows += [row[row != 0] for row in logprobs.detach()] if batch.indices else []
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}, rows


def assert_same_gradients(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item() + 1e-6
        torch.testing.assert_close(actual[name], gradient, atol=2e-5 * scale, rtol=1e-3, msg=name)


def test_logprobs_match_the_plain_hf_model(
    data: TrainingData, policy: PolicyModel, spec: ImageSpec, examples: list[Example]
) -> None:
    """Compare packed positions, patches, tower, attention and head with HF, one trajectory at a time."""
    from transformers import AutoImageProcessor

    hf = load_pretrained(data.model, torch.float32)
    processor = AutoImageProcessor.from_pretrained(data.model)
    with torch.no_grad():
        ours, entropy = policy(build_batch(range(len(examples)), examples, data, policy, spec))
    for row, example in enumerate(examples):
        ids = torch.from_numpy(example.token_ids)[None]
        images = processor(images=[data.pixels[r.digest] for r in example.refs], return_tensors="pt")
        with torch.no_grad():
            logits = hf(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == policy.tokens.image).int(),
                **images,
            ).logits[0, example.sampled_positions - 1]
        logits = logits / torch.from_numpy(example.temperature)[:, None]
        logits[:, list(policy.tokens.vision)] = float("-inf")
        distribution = torch.distributions.Categorical(logits=logits)
        count = len(example.sampled_positions)
        expected = distribution.log_prob(torch.from_numpy(example.token_ids[example.sampled_positions]))
        torch.testing.assert_close(ours[row, :count], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(entropy[row, :count], distribution.entropy(), atol=1e-5, rtol=0)
        assert ours[row, count:].abs().sum() == 0


def test_sharing_frames_keeps_logprobs_and_gradients(
    data: TrainingData, policy: PolicyModel, spec: ImageSpec, examples: list[Example]
) -> None:
    shared = build_batch(range(6), examples, data, policy, spec)
    separate = build_batch(range(6), examples, data, policy, spec, share_frames=False)
    assert len(shared.grids) == 2 * 3 + 6 * 2
    assert len(separate.grids) == 6 * (3 + 2)
    shared_gradients, shared_rows = gradients(policy, [shared])
    separate_gradients, separate_rows = gradients(policy, [separate])
    assert_same_gradients(shared_gradients, separate_gradients)
    for row, separate_row in zip(shared_rows, separate_rows, strict=True):
        torch.testing.assert_close(row, separate_row, atol=1e-6, rtol=0)


def test_micro_batch_gradients_add_up(
    data: TrainingData, policy: PolicyModel, spec: ImageSpec, examples: list[Example]
) -> None:
    whole, _ = gradients(policy, [build_batch(range(6), examples, data, policy, spec)])
    parts = [build_batch(part, examples, data, policy, spec) for part in ([3, 0], [5], [], [1, 2, 4])]
    assert_same_gradients(whole, gradients(policy, parts)[0])


def test_empty_micro_batch_involves_every_weight(
    data: TrainingData, policy: PolicyModel, spec: ImageSpec, examples: list[Example]
) -> None:
    """ZeRO-3 gathers weights on use, so that an idle rank must use all of them."""
    all_gradients, _ = gradients(policy, [build_batch([], examples, data, policy, spec)])
    assert all_gradients.keys() == dict(policy.named_parameters()).keys()
    assert all(gradient.abs().max() == 0 for gradient in all_gradients.values())


def test_frames_of_equal_bytes_and_other_shapes_differ(
    data: TrainingData, policy: PolicyModel, spec: ImageSpec
) -> None:
    wide, side = data.trajectories[0], spec.patch_size * spec.merge_size
    black = np.zeros((side, 2 * side, 3), dtype=np.uint8)
    ref = replace(wide.frame_refs[0], digest="black", width=2 * side, height=side)
    tall = replace(ref, width=side, height=2 * side)
    image = policy.tokens.image
    context = TokenContext((30, image, 31, image, 32), ((1, 2, 4), (1, 4, 2)), (ref, tall), pad_id=image, merge_size=2)
    turn = Turn(ExternalAction("", (40, 41)), "", None, None)
    example = encode_trajectory(
        replace(wide, prompt=context, turns=(turn,)), policy.tokens, policy.shape.vision.merge_size
    )
    batch = collate(
        [PrefixTree.from_members([0], [example])],
        [example],
        in_memory_pixels({"black": black}),
        policy.tokens,
        spec,
        CPU,
    )
    assert batch.grids.tolist() == [[1, 2, 4], [1, 4, 2]]
    assert torch.isnan(batch.engine_logprobs).all()


def test_loss_mask_marks_exactly_the_sampled_tokens(data: TrainingData, policy: PolicyModel) -> None:
    for trajectory in data.trajectories:
        example = encode_trajectory(trajectory, policy.tokens, policy.shape.vision.merge_size)
        sampled = [token for turn in trajectory.turns for token in turn.action.token_ids]
        assert example.token_ids[example.sampled_positions].tolist() == sampled
        assert example.engine_logprobs.tolist() == pytest.approx(list(trajectory.sampled_logprobs))
        assert example.temperature.tolist() == pytest.approx(
            [t.action.sampling_params.temperature for t in trajectory.turns for _ in t.action.token_ids]
        )
        assert not np.isin(example.token_ids[example.sampled_positions], policy.tokens.vision).any()


def _break(trajectory: Trajectory, kind: str, image: int) -> Trajectory:
    first, *rest = trajectory.turns
    if kind == "placeholder":
        action = replace(first.action, token_ids=(image, *first.action.token_ids[1:]))
        return replace(trajectory, turns=(replace(first, action=action), *rest))
    if kind == "logprobs":
        action = replace(first.action, logprobs=first.action.logprobs[1:])
        return replace(trajectory, turns=(replace(first, action=action), *rest))
    return replace(trajectory, turns=())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("placeholder", "sampled the vision placeholder"),
        ("logprobs", "log-probs"),
        ("nothing", "no sampled token"),
    ],
)
def test_inconsistent_trajectory_is_refused(data: TrainingData, policy: PolicyModel, kind: str, message: str) -> None:
    broken = _break(data.trajectories[0], kind, policy.tokens.image)
    with pytest.raises(ValueError, match=message):
        encode_trajectory(broken, policy.tokens, policy.shape.vision.merge_size)


def test_other_merge_size_is_refused(data: TrainingData, policy: PolicyModel) -> None:
    with pytest.raises(ValueError, match="image slots, but its 5 frames make"):
        encode_trajectory(data.trajectories[0], policy.tokens, 1)


def test_missing_or_resized_pixels_are_refused(
    data: TrainingData, policy: PolicyModel, spec: ImageSpec, examples: list[Example]
) -> None:
    with pytest.raises(KeyError, match=r"no pixels for the frame of video\.mp4"):
        collate([PrefixTree.from_members([0], examples)], examples, in_memory_pixels({}), policy.tokens, spec, CPU)
    wrong_grids = replace(examples[0], grids=examples[0].grids[::-1].copy() + 2)
    with pytest.raises(ValueError, match=r"the trajectory has|image tokens"):
        collate(
            [PrefixTree.from_members([0], [wrong_grids])],
            [wrong_grids],
            in_memory_pixels(data.pixels),
            policy.tokens,
            spec,
            CPU,
        )


def test_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a directory"):
        check_hf_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config\.json"):
        check_hf_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="safetensors"):
        check_hf_checkpoint(tmp_path)


def test_unsupported_model_type_is_refused(data: TrainingData, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "qwen2_vl"}')
    (other / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="other' is 'qwen2_vl'; supported: qwen2_5_vl"):
        load_pretrained(other, torch.float32)
