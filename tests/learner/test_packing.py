"""Packing: shared prefixes, token limits, balance over ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.learner.training_data import TrainingData, make_varied_data
from vz_ray.learner.example import Example, SpecialTokenIds, encode_trajectory, frame_key
from vz_ray.learner.packing import FlopCosts, PrefixTree, common_prefix_length, plan_micro_batches
from vz_ray.utils.errors import UserError


@pytest.fixture(scope="module")
def data(model: Path) -> TrainingData:
    return make_varied_data(model)


@pytest.fixture(scope="module")
def examples(data: TrainingData) -> list[Example]:
    tokens = SpecialTokenIds.from_pretrained(data.model)
    return [encode_trajectory(trajectory, tokens, 2) for trajectory in data.trajectories]


def text_example(length: int, group: str, shared: int = 0, name: str = "") -> Example:
    """Return a text-only example; the first `shared` tokens are equal in the whole group."""
    ids = np.full(length, 7 + hash(name) % 1000)
    ids[:shared] = 1
    empty = np.zeros(0, dtype=np.int64)
    zero = np.zeros(1, dtype=np.float32)
    return Example(
        name=name,
        group_id=group,
        token_ids=np.append(ids, 2),
        sampled_positions=np.asarray([length]),
        engine_logprobs=zero,
        temperature=zero + 1,
        weight_versions=np.zeros(1, dtype=np.int64),
        after_image=np.zeros(1, dtype=np.bool_),
        turn_lengths=np.ones(1, dtype=np.int64),
        grids=empty.reshape(0, 3),
        image_starts=empty,
        image_token_counts=empty,
        refs=(),
    )


def test_prefix_covers_prompt_and_common_first_tokens(data: TrainingData, examples: list[Example]) -> None:
    group = examples[:5]
    prompt = len(data.trajectories[0].prompt.expanded_ids)
    assert common_prefix_length(group) == prompt + 3
    assert common_prefix_length([group[0], examples[5]]) < prompt


def test_prefix_ends_before_a_frame_that_differs(examples: list[Example]) -> None:
    first = examples[0]
    end = int(first.image_starts[2])
    other = replace(first.refs[2], digest="another")
    differs = replace(first, refs=(*first.refs[:2], other, *first.refs[3:]))
    assert common_prefix_length([first, differs]) == end
    # A larger frame has equal ids in its first part, since all its tokens are image pads.
    pad = first.token_ids[end]
    larger = replace(
        first,
        token_ids=np.insert(first.token_ids, end, [pad] * 3),
        image_token_counts=first.image_token_counts + 3 * (np.arange(len(first.image_token_counts)) == 2),
        sampled_positions=first.sampled_positions + 3,
        refs=(*first.refs[:2], other, *first.refs[3:]),
    )
    assert common_prefix_length([first, larger]) == end
    assert common_prefix_length([larger, first]) == end


def test_tree_counts_its_prefix_once(examples: list[Example]) -> None:
    tree = PrefixTree.from_members(range(5), examples, FlopCosts(token=1.0))
    alone = sum(e.context_length for e in examples[:5])
    assert tree.num_tokens == alone - 4 * tree.prefix_length == tree.flops
    patches = PrefixTree.from_members(range(5), examples, FlopCosts(token=0.0, patch=1.0)).flops
    shared = examples[0].grids[:4].prod(axis=1).sum()
    all_patches = sum(e.grids.prod(axis=1).sum() for e in examples[:5])
    assert patches == all_patches - 4 * shared


def test_tree_cost_counts_attention_pairs() -> None:
    examples = [text_example(n, "g", 6, name=str(n)) for n in (8, 11, 6)]
    tree = PrefixTree.from_members(range(3), examples, FlopCosts(token=0.0, pair=2.0))
    assert tree.prefix_length == 6
    pairs = 6 * 7 / 2 + sum(b * 6 + b * (b + 1) / 2 for b in (2, 5, 0))
    assert tree.flops == 2 * pairs


def test_tokens_after_the_last_sampled_one_are_dropped(examples: list[Example]) -> None:
    example = examples[0]
    longer = replace(example, token_ids=np.append(example.token_ids, [5] * 100))
    assert longer.length == example.length + 100
    assert longer.context_length == example.context_length == example.length - 1


@given(
    groups=st.lists(st.lists(st.integers(9, 40), min_size=1, max_size=6), max_size=8),
    budget=st.integers(40, 200),
    ranks=st.integers(1, 4),
    share=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_plan_covers_each_example_once_within_the_budget(
    groups: list[list[int]], budget: int, ranks: int, share: bool
) -> None:
    examples = [
        text_example(length, str(g), 8, name=f"{g}/{k}")
        for g, lengths in enumerate(groups)
        for k, length in enumerate(lengths)
    ]
    plan = plan_micro_batches(examples, budget, ranks, share_prefixes=share)
    assert plan == plan_micro_batches(examples, budget, ranks, share_prefixes=share)
    assert len(plan) == ranks
    assert len({len(steps) for steps in plan}) == 1
    assert len(plan[0]) >= 1
    batches = [batch for steps in plan for batch in steps]
    assert sorted(i for batch in batches for tree in batch for i in tree.members) == list(range(len(examples)))
    assert all(sum(tree.num_tokens for tree in batch) <= budget for batch in batches)
    for tree in (tree for batch in batches for tree in batch):
        assert len({examples[i].group_id for i in tree.members}) == 1
        assert share or len(tree.members) == 1


def test_single_group_is_split_over_ranks() -> None:
    examples = [text_example(40, "g", 8, name=str(k)) for k in range(8)]
    plan = plan_micro_batches(examples, 10_000, 2)
    assert [sum(len(t.members) for t in steps[0]) for steps in plan] == [4, 4]


def test_micro_steps_have_similar_costs_on_all_ranks() -> None:
    rng = np.random.default_rng(0)
    examples = [
        text_example(int(rng.integers(60, 400)), str(g), 50, name=f"{g}/{k}") for g in range(16) for k in range(8)
    ]
    plan = plan_micro_batches(examples, 2500, 4, FlopCosts(token=1.0, pair=0.01))
    costs = np.asarray([[sum(tree.flops for tree in batch) for batch in steps] for steps in plan])
    assert costs.shape[1] > 1
    assert (costs.max(axis=0) <= 1.2 * costs.mean(axis=0)).all()


def test_trajectory_over_the_budget_is_refused() -> None:
    examples = [text_example(50, "g", name="0/task/1"), text_example(10, "g", name="0/task/2")]
    with pytest.raises(UserError, match=r"0/task/1 has 50 tokens to compute.*micro_batch_tokens \(40\)"):
        plan_micro_batches(examples, 40, 1)


def test_frame_key_includes_the_size(examples: list[Example]) -> None:
    ref = examples[0].refs[0]
    assert frame_key(replace(ref, width=28, height=56)) != frame_key(replace(ref, width=56, height=28))
