"""Which trajectories go through the model together, and what is computed once for all of them.

The samples of a group begin alike: system prompt, overview and question, often the first words that were
sampled too. They are packed as one sequence without padding,

    [prefix, branch 1, branch 2, ... branch n]

in which every branch sees the prefix and itself: a `PrefixTree`. A micro-batch is a row of trees. Each trajectory
still gets the log-probs, and gives the gradient, that it would have alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vz_ray.learner.example import Example, frame_key
from vz_ray.planning import packed_pairs
from vz_ray.utils.errors import UserError

_UNEVEN = 1.2
"""A group is split over ranks where the fullest micro-batch costs this many times the mean."""


@dataclass(frozen=True, slots=True)
class FlopCosts:
    """Floating-point operations of a forward pass, for balancing ranks.

    Attributes:
        token: Of one text token, without attention.
        pair: Of one token looking at one other.
        patch: Of one patch in the vision tower.
    """

    token: float = 1.0
    pair: float = 0.0
    patch: float = 0.0


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """Trajectories whose first `prefix_length` tokens are the same and computed once.

    Attributes:
        members: Places in the list of examples.
        prefix_length: Tokens; 0 where there is one member.
        num_tokens: Tokens to compute.
        flops: Floating-point operations, see `FlopCosts`.
    """

    members: tuple[int, ...]
    prefix_length: int
    num_tokens: int
    flops: float

    @classmethod
    def from_members(
        cls, members: Sequence[int], examples: Sequence[Example], costs: FlopCosts | None = None
    ) -> PrefixTree:
        """A tree of these members, with the longest prefix that they share."""
        costs, chosen = costs or FlopCosts(), [examples[i] for i in members]
        prefix = common_prefix_length(chosen) if len(chosen) > 1 else 0
        branches = [e.context_length - prefix for e in chosen]
        grids = [e.grids[e.frame_slice(prefix, e.context_length)] for e in chosen]
        patches = sum(
            grid.prod(axis=1).sum() for grid in [chosen[0].grids[chosen[0].frame_slice(0, prefix)], *grids]
        )
        tokens = prefix + sum(branches)
        cost = costs.token * tokens + costs.pair * packed_pairs(prefix, branches)
        cost += costs.patch * float(patches)
        return cls(tuple(members), prefix, tokens, cost)


def common_prefix_length(examples: Sequence[Example]) -> int:
    """How many tokens these contexts begin with in common; of a frame that all show, all of it or none."""
    first = examples[0]
    length = min(e.context_length for e in examples)
    for other in examples[1:]:
        differ = np.flatnonzero(first.token_ids[:length] != other.token_ids[:length])
        length = int(differ[0]) if len(differ) else length
        for start, mine, theirs in zip(first.image_starts, first.refs, other.refs, strict=False):
            if start < length and frame_key(mine) != frame_key(theirs):
                length = int(start)
    # Ids alone may agree through a part of a frame, where another one is larger.
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
    """Which trees each rank takes in each micro-step: `[rank][step] -> trees`.

    A micro-batch has at most `max_tokens` tokens. A group too large for one is split into trees that each
    compute the prefix; so is one whose rank would keep the others waiting. Every rank gets the same number
    of micro-steps, some possibly empty, of about the same cost. The plan depends on nothing but the
    arguments, so that ranks agree on it without talking.

    Args:
        share_prefixes: Whether members of a group share their prefix; else each is a tree of its own.

    Raises:
        UserError: A trajectory alone has more than `max_tokens` tokens.
    """
    longest = max(examples, key=lambda e: e.context_length, default=None)
    if longest is not None and longest.context_length > max_tokens:
        raise UserError(
            f"trajectory {longest.name} has {longest.context_length} tokens to compute, more than "
            f"learner.micro_batch_tokens ({max_tokens}): raise it to at least that"
        )
    costs = costs or FlopCosts()
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(example.group_id if share_prefixes else str(index), []).append(index)
    trees = [tree for members in groups.values() for tree in _fitted(members, examples, max_tokens, costs)]
    return _deal(_even(trees, examples, max_tokens, world_size, costs), world_size)


def _fitted(
    members: list[int], examples: Sequence[Example], budget: int, costs: FlopCosts
) -> list[PrefixTree]:
    """As few trees as hold a group within the budget."""
    for parts in range(1, len(members) + 1):
        trees = _split(members, parts, examples, costs)
        if all(tree.num_tokens <= budget for tree in trees):
            return trees
    raise AssertionError("a tree of one member is within the budget")


def _split(
    members: Sequence[int], parts: int, examples: Sequence[Example], costs: FlopCosts
) -> list[PrefixTree]:
    """A group as `parts` trees of about equal length."""
    bins: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(members, key=lambda i: (-examples[i].context_length, i)):
        min(bins, key=lambda b: sum(examples[i].context_length for i in b)).append(index)
    return [PrefixTree.from_members(sorted(part), examples, costs) for part in bins if part]


def _even(
    trees: list[PrefixTree], examples: Sequence[Example], budget: int, ranks: int, costs: FlopCosts
) -> list[list[PrefixTree]]:
    """Micro-batches, their number a multiple of `ranks`; trees are split while that evens them out."""
    batches = _fill(trees, budget, ranks)
    while ranks > 1:
        fullest = max(batches, key=_cost)
        mean = sum(map(_cost, batches)) / len(batches)
        widest = max(fullest, key=lambda tree: tree.flops, default=None)
        if widest is None or len(widest.members) < 2 or _cost(fullest) <= _UNEVEN * mean:
            break
        halves = _split(widest.members, 2, examples, costs)
        trees = [tree for tree in trees if tree is not widest] + halves
        evened = _fill(trees, budget, ranks)
        if max(map(_cost, evened)) >= _cost(fullest):
            break
        batches = evened
    return batches


def _fill(trees: Sequence[PrefixTree], budget: int, ranks: int) -> list[list[PrefixTree]]:
    """Deals trees into the fewest micro-batches: the costliest first, each into the cheapest with room."""
    order = sorted(trees, key=lambda tree: (-tree.flops, tree.members))
    rounds = max(1, -(-sum(tree.num_tokens for tree in trees) // (budget * ranks)))
    while True:
        batches: list[list[PrefixTree]] = [[] for _ in range(rounds * ranks)]
        for tree in order:
            room = [
                batch for batch in batches if tree.num_tokens + sum(t.num_tokens for t in batch) <= budget
            ]
            if not room:
                break
            min(room, key=_cost).append(tree)
        else:
            return batches
        rounds += 1


def _cost(batch: Sequence[PrefixTree]) -> float:
    return sum(tree.flops for tree in batch)


def _deal(batches: list[list[PrefixTree]], ranks: int) -> list[list[list[PrefixTree]]]:
    """Deals micro-batches out, costliest first, in rounds: the emptiest rank takes the costliest of a round.

    Micro-batches of one step are alike then, and no rank waits long for another.
    """
    order = sorted(range(len(batches)), key=lambda b: (-_cost(batches[b]), b))
    dealt: list[list[list[PrefixTree]]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for start in range(0, len(order), ranks):
        emptiest = sorted(range(ranks), key=lambda r: load[r])
        for rank, batch in zip(emptiest, order[start : start + ranks], strict=True):
            dealt[rank].append(batches[batch])
            load[rank] += _cost(batches[batch])
    return dealt
