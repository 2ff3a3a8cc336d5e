"""Packing of trajectories into micro-batches, with shared prefixes computed once.

The samples of a group share a prefix: system prompt, overview, question, often the first sampled tokens. They
are packed as one sequence without padding, a `PrefixTree`:

    [prefix, branch 1, branch 2, ... branch n]

Every branch attends to the prefix and to itself. A micro-batch is a sequence of trees. Log-probs and
gradients equal those of each trajectory alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vz_ray.learner.example import Example, frame_key
from vz_ray.planning import packed_pairs
from vz_ray.utils.errors import UserError

_MAX_IMBALANCE = 1.2
"""Groups are split over ranks while the costliest micro-batch exceeds the mean cost by this factor."""


@dataclass(frozen=True, slots=True)
class FlopCosts:
    """Floating-point operations of a forward pass, used to balance ranks.

    Attributes:
        token: Per text token, without attention.
        pair: Per pair of query and key.
        patch: Per patch in the vision tower.
    """

    token: float = 1.0
    pair: float = 0.0
    patch: float = 0.0


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """Trajectories whose first `prefix_length` tokens are equal and computed once.

    Attributes:
        members: Indices in the list of examples.
        prefix_length: Number of shared tokens; 0 for a single member.
        num_tokens: Number of computed tokens.
        flops: Floating-point operations of a forward pass, see `FlopCosts`.
    """

    members: tuple[int, ...]
    prefix_length: int
    num_tokens: int
    flops: float

    @classmethod
    def from_members(
        cls, members: Sequence[int], examples: Sequence[Example], costs: FlopCosts | None = None
    ) -> PrefixTree:
        """Build the tree of these members with their longest common prefix."""
        costs, chosen = costs or FlopCosts(), [examples[i] for i in members]
        prefix = common_prefix_length(chosen) if len(chosen) > 1 else 0
        branches = [e.context_length - prefix for e in chosen]
        grids = [e.grids[e.frame_slice(prefix, e.context_length)] for e in chosen]
        patches = sum(grid.prod(axis=1).sum() for grid in [chosen[0].grids[chosen[0].frame_slice(0, prefix)], *grids])
        tokens = prefix + sum(branches)
        cost = costs.token * tokens + costs.pair * packed_pairs(prefix, branches)
        cost += costs.patch * float(patches)
        return cls(tuple(members), prefix, tokens, cost)


def common_prefix_length(examples: Sequence[Example]) -> int:
    """Return the number of tokens that these contexts share at the start; frames are shared whole."""
    first = examples[0]
    length = min(e.context_length for e in examples)
    for other in examples[1:]:
        differ = np.flatnonzero(first.token_ids[:length] != other.token_ids[:length])
        length = int(differ[0]) if len(differ) else length
        for start, ref, other_ref in zip(first.image_starts, first.refs, other.refs, strict=False):
            if start < length and frame_key(ref) != frame_key(other_ref):
                length = int(start)
    # Ids can agree within a frame if the other frame is larger; cut before the partial frame.
    cut = (first.image_starts < length) & (first.image_starts + first.image_token_counts > length)
    return int(first.image_starts[cut][0]) if cut.any() else length


def plan_micro_batches(
    examples: Sequence[Example],
    max_tokens: int,
    world_size: int,
    costs: FlopCosts | None = None,
    *,
    share_prefixes: bool = True,
) -> list[list[list[PrefixTree]]]:
    """Assign trees to ranks and micro-steps: `[rank][micro-step] -> trees`.

    A group that exceeds `max_tokens` is split into trees that each compute the prefix. So is a group that
    would make its rank much slower than the others. Every rank gets the same number of micro-steps of similar
    cost; some can be empty. The result is deterministic, so that ranks agree on it without communication.

    Args:
        max_tokens: Maximum number of tokens in a micro-batch.
        share_prefixes: Whether members of a group share their prefix; otherwise each trajectory is one tree.

    Raises:
        UserError: A single trajectory has more than `max_tokens` tokens.
    """
    longest = max(examples, key=lambda e: e.context_length, default=None)
    if longest is not None and longest.context_length > max_tokens:
        raise UserError(
            f"trajectory {longest.name} has {longest.context_length} tokens to compute, above "
            f"learner.micro_batch_tokens ({max_tokens}). Raise it to at least {longest.context_length}."
        )
    costs = costs or FlopCosts()
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(example.group_id if share_prefixes else str(index), []).append(index)
    trees = [tree for members in groups.values() for tree in _split_to_fit(members, examples, max_tokens, costs)]
    micro_batches = _balance(trees, examples, max_tokens, world_size, costs)
    return _assign_to_ranks(micro_batches, world_size)


def _split_to_fit(
    members: list[int], examples: Sequence[Example], max_tokens: int, costs: FlopCosts
) -> list[PrefixTree]:
    """Split a group into the fewest trees of at most `max_tokens`."""
    for parts in range(1, len(members) + 1):
        trees = _split(members, parts, examples, costs)
        if all(tree.num_tokens <= max_tokens for tree in trees):
            return trees
    raise AssertionError("a tree of one member has at most max_tokens tokens")


def _split(members: Sequence[int], parts: int, examples: Sequence[Example], costs: FlopCosts) -> list[PrefixTree]:
    """Split a group into `parts` trees of similar length."""
    bins: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(members, key=lambda i: (-examples[i].context_length, i)):
        min(bins, key=lambda b: sum(examples[i].context_length for i in b)).append(index)
    return [PrefixTree.from_members(sorted(part), examples, costs) for part in bins if part]


def _balance(
    trees: list[PrefixTree],
    examples: Sequence[Example],
    max_tokens: int,
    world_size: int,
    costs: FlopCosts,
) -> list[list[PrefixTree]]:
    """Build micro-batches, a multiple of `world_size`; split trees while that reduces the maximum cost."""
    batches = _fill_micro_batches(trees, max_tokens, world_size)
    while world_size > 1:
        costliest_batch = max(batches, key=_cost)
        mean = sum(map(_cost, batches)) / len(batches)
        costliest_tree = max(costliest_batch, key=lambda tree: tree.flops, default=None)
        if costliest_tree is None or len(costliest_tree.members) < 2:
            break
        if _cost(costliest_batch) <= _MAX_IMBALANCE * mean:
            break
        halves = _split(costliest_tree.members, 2, examples, costs)
        trees = [tree for tree in trees if tree is not costliest_tree] + halves
        rebalanced = _fill_micro_batches(trees, max_tokens, world_size)
        if max(map(_cost, rebalanced)) >= _cost(costliest_batch):
            break
        batches = rebalanced
    return batches


def _fill_micro_batches(trees: Sequence[PrefixTree], max_tokens: int, world_size: int) -> list[list[PrefixTree]]:
    """Put trees into the fewest micro-batches: costliest first, each into the cheapest one with room."""
    ordered = sorted(trees, key=lambda tree: (-tree.flops, tree.members))
    steps = max(1, -(-sum(tree.num_tokens for tree in trees) // (max_tokens * world_size)))
    while True:
        batches: list[list[PrefixTree]] = [[] for _ in range(steps * world_size)]
        for tree in ordered:
            with_room = [
                batch for batch in batches if tree.num_tokens + sum(other.num_tokens for other in batch) <= max_tokens
            ]
            if not with_room:
                break
            min(with_room, key=_cost).append(tree)
        else:
            return batches
        steps += 1


def _cost(batch: Sequence[PrefixTree]) -> float:
    return sum(tree.flops for tree in batch)


def _assign_to_ranks(batches: list[list[PrefixTree]], world_size: int) -> list[list[list[PrefixTree]]]:
    """Assign micro-batches to ranks, costliest first; the least loaded rank takes the costliest of a step.

    Micro-batches of one step have similar costs, so that ranks do not wait for each other.
    """
    ordered = sorted(range(len(batches)), key=lambda index: (-_cost(batches[index]), index))
    assigned: list[list[list[PrefixTree]]] = [[] for _ in range(world_size)]
    load = [0.0] * world_size
    for start in range(0, len(ordered), world_size):
        ranks_by_load = sorted(range(world_size), key=lambda rank: load[rank])
        for rank, index in zip(ranks_by_load, ordered[start : start + world_size], strict=True):
            assigned[rank].append(batches[index])
            load[rank] += _cost(batches[index])
    return assigned
