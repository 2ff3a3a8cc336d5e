"""Time of a learner step: computation, communication of ZeRO, and the optimizer of offloaded states."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vz_ray.config.learner import LearnerConfig
from vz_ray.planning import learner_flops
from vz_ray.planning.assumptions import Assumptions
from vz_ray.planning.episode_budget import EpisodeBudget
from vz_ray.planning.planner import PlannableConfig, ResourcePlan, updates_per_step

GPUS_PER_NODE = 8
"""Assumed GPUs of a node; more ranks communicate over the network."""
CPU_ADAM_S = 0.93
"""Seconds of fused AdamW on the host per 1e9 elements, measured on two CPU cores."""
OFFLOADED_BYTES = 6
"""Bytes per element that an offloaded optimizer moves: a float32 gradient and a bfloat16 weight."""


@dataclass(frozen=True, slots=True)
class LearnerTime:
    """Seconds of a learner step.

    Attributes:
        compute_s: Forward and backward passes on the rank with the most sequences.
        communication_s: Gathers of weights and reductions of gradients.
        offload_s: Optimizer steps and copies of offloaded states.
    """

    compute_s: float
    communication_s: float
    offload_s: float

    @property
    def seconds(self) -> float:
        return self.compute_s + self.communication_s + self.offload_s


def learner_time(
    config: PlannableConfig, plan: ResourcePlan, episode: EpisodeBudget, assumptions: Assumptions
) -> LearnerTime:
    """Return the time of one step on a batch of equal episodes.

    Every rank runs the same number of micro-batches under ZeRO-3, so that ranks wait for the one with the most.
    """
    learner = config.learner
    ranks, updates = learner.world_size, updates_per_step(config)
    max_tokens = max(learner.micro_batch_tokens, episode.tokens)
    sequences = (
        learner_flops.split_group(episode, plan.group_size, max_tokens)
        if learner.share_prefixes
        else [1] * plan.group_size
    )
    tokens = [episode.prefix_tokens + branches * episode.branch_tokens for branches in sequences]
    per_micro_batch = max(1, max_tokens // max(tokens))
    groups = plan.batch_size / updates
    micro_batches = math.ceil(groups * len(sequences) / per_micro_batch)
    concurrent = ranks // learner.sequence_parallel_size
    micro_steps = math.ceil(micro_batches / concurrent)
    rate = learner_flops.ComputeRate(ranks, assumptions.peak_tflops * 1e12, assumptions.mfu)
    group_size = plan.group_size if learner.share_prefixes else 1
    batch = plan.batch_size * plan.group_size // group_size
    work = learner_flops.packed_work(plan.shape, episode, batch, group_size, max_tokens, plan.passes, rate)
    imbalance = micro_steps * concurrent / micro_batches
    steps = updates * micro_steps * plan.passes.updates
    return LearnerTime(
        compute_s=work.seconds * imbalance,
        communication_s=_communication_s(learner, plan, steps, updates, assumptions)
        + _exchange_s(learner, plan, work.tokens / ranks, assumptions),
        offload_s=_offload_s(learner, plan, steps, updates, assumptions),
    )


def _communication_s(
    learner: LearnerConfig, plan: ResourcePlan, micro_steps: int, updates: int, assumptions: Assumptions
) -> float:
    """Return the time of collectives: ZeRO-3 gathers the weights for each pass of a micro-batch."""
    ranks = learner.world_size
    link = assumptions.node_gbps if ranks <= GPUS_PER_NODE else assumptions.network_gbps
    share = (ranks - 1) / ranks / (link * 1e9)
    gradients = plan.weight_bytes * plan.trainable_params
    if learner.zero_stage < 3:
        return 2 * share * gradients * updates
    weights = plan.weight_bytes * plan.shape.parameters
    # Forward and backward; and the passes for old log-probs and the reference model.
    return share * micro_steps * (weights * (2 + plan.passes.forward_only) + gradients)


def _exchange_s(learner: LearnerConfig, plan: ResourcePlan, tokens: float, assumptions: Assumptions) -> float:
    """Return the time in which ranks that share sequences exchange queries, keys, values and outputs.

    Args:
        tokens: Tokens of a rank in one pass of the batch.
    """
    size, text = learner.sequence_parallel_size, plan.shape.text
    per_layer = 2 * text.query_dim + 2 * text.kv_dim * max(1, size // text.kv_heads)
    # Forward, backward, and the recomputed forward pass.
    passes = plan.passes.updates * (2 + plan.passes.checkpointing) + plan.passes.forward_only
    size_bytes = plan.weight_bytes * tokens * text.layers * per_layer * passes
    return size_bytes * (size - 1) / size / (assumptions.node_gbps * 1e9)


def _offload_s(
    learner: LearnerConfig, plan: ResourcePlan, micro_steps: int, updates: int, assumptions: Assumptions
) -> float:
    if learner.offload == "none":
        return 0.0
    elements = plan.trainable_params / learner.world_size
    host = assumptions.host_gbps * 1e9
    seconds = updates * elements * (CPU_ADAM_S / 1e9 + OFFLOADED_BYTES / host)
    if learner.offload == "all":
        copies = plan.weight_bytes * plan.shape.parameters / learner.world_size
        seconds += micro_steps * (2 + plan.passes.forward_only) * copies / host
    return seconds
