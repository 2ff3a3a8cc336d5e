"""Time of a training step: rollout, learning, publish; as configured and for other uses of the same GPUs.

    in turns      rollout + learning + publish            max_staleness 0
    overlapping   max(rollout, learning) + publish        max_staleness 1
    colocated     rollout + learning + publish + switch   every GPU has an engine and a rank

Communication is assumed not to overlap with computation. Evaluation and checkpoints are excluded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vz_ray.config.run import GrpoRunConfig
from vz_ray.planning.assumptions import Assumptions
from vz_ray.planning.colocation import state_bytes
from vz_ray.planning.config_changes import format_setting, with_values
from vz_ray.planning.engine_speed import EngineSpeed, RolloutWork
from vz_ray.planning.learner_time import GPUS_PER_NODE, LearnerTime, learner_time
from vz_ray.planning.planner import ResourcePlan, make_plan
from vz_ray.planning.published_weights import published_bytes
from vz_ray.utils.errors import UserError

PUBLISH_OVERHEAD_S = 3.0
"""Assumed time of a publish without the transfer: pause, load, parity probe, resume."""
SWITCH_OVERHEAD_S = 5.0
"""Assumed time to put an engine to sleep and to wake it, without copies."""
PREFER_ON_POLICY = 0.1
"""A split with stale tokens is recommended only if it saves more than this fraction of the step."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Time of a step with one use of the GPUs.

    Attributes:
        mode: `in turns`, `overlapping` or `colocated`.
        engines: Number of engines.
        ranks: Number of learner ranks.
        max_staleness: Maximum age of a token in updates.
        rollout_s: Rollout of a batch, and its scores by the teacher, if there is one.
        learner: Learner step on the batch.
        publish_s: Weight publish.
        switch_s: Moving learner states, and engine weights with sleep level 1; waking engines. 0 unless colocated.
        bytes_over: Bytes that a GPU lacks; at most 0 if everything fits.
        settings: Overrides of the config.
    """

    mode: str
    engines: int
    ranks: int
    max_staleness: int
    rollout_s: float
    learner: LearnerTime
    publish_s: float
    switch_s: float
    bytes_over: int
    settings: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Time of the whole step."""
        if self.max_staleness:
            return max(self.rollout_s, self.learner.seconds) + self.publish_s
        return self.rollout_s + self.learner.seconds + self.publish_s + self.switch_s

    @property
    def fits(self) -> bool:
        return self.bytes_over <= 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Step times of a run.

    Attributes:
        num_gpus: GPUs of engines and learner.
        configured: As configured.
        alternatives: The best split in turns, the best overlapping split, and colocated; those that exist.
        recommended: One of these.
        reason: Why it is recommended.
    """

    num_gpus: int
    configured: StepTime
    alternatives: tuple[StepTime, ...]
    recommended: StepTime
    reason: str


def plan_steps(config: GrpoRunConfig, plan: ResourcePlan, assumptions: Assumptions) -> StepPlan:
    """Return the step time of a run as configured, and of the best other uses of its GPUs.

    Args:
        config: Config of the run.
        plan: Its plan.
        assumptions: Those of the plan.
    """
    configured = step_time(config, plan, assumptions)
    num_gpus = count_gpus(config)
    best: dict[str, StepTime] = {}
    for settings in _candidates(config, num_gpus):
        candidate = _time_with(config, settings, plan, assumptions)
        if candidate is not None and _order(candidate) < _order(best.get(candidate.mode)):
            best[candidate.mode] = candidate
    alternatives = [candidate for candidate in best.values() if candidate.settings]
    recommended, reason = _recommend(configured, alternatives)
    return StepPlan(num_gpus, configured, tuple(alternatives), recommended, reason)


def step_time(config: GrpoRunConfig, plan: ResourcePlan, assumptions: Assumptions) -> StepTime:
    """Return the step time of a config as it is."""
    assert plan.engine is not None
    rollout, colocated = config.rollout, config.train.colocate
    episode = plan.typical
    resident = max(1, plan.engine.kv_tokens // (episode.tokens + plan.engine.state_tokens))
    work = RolloutWork(
        episode=episode,
        zooms=min(assumptions.zooms, config.episode.max_rounds - 1),
        batch_size=plan.batch_size,
        group_size=plan.group_size,
        concurrency=min(rollout.max_concurrent_episodes, resident),
        decoder_cpus=config.clips.actor_limit * max(config.clips.cpus_per_actor, 1.0),
    )
    speed = EngineSpeed.of_gpus(plan.shape, assumptions, rollout.engine.tensor_parallel_size)
    moved = state_bytes(plan.learner) + (2 * plan.shape.parameters if config.sleep_level == 1 else 0)
    rollout_s = work.seconds(speed, rollout.worker_limit)
    if plan.teacher is not None:  # it scores groups as they finish
        rollout_s = max(rollout_s, plan.teacher.step_s) + plan.teacher.group_s
    return StepTime(
        mode="colocated" if colocated else "overlapping" if config.train.max_staleness else "in turns",
        engines=rollout.worker_limit,
        ranks=config.learner.world_size,
        max_staleness=config.train.max_staleness,
        rollout_s=rollout_s,
        learner=learner_time(config, plan, plan.typical, assumptions),
        publish_s=_publish_s(config, plan, assumptions),
        switch_s=SWITCH_OVERHEAD_S + 2 * moved / (assumptions.host_gbps * 1e9) if colocated else 0.0,
        bytes_over=max(plan.learner_bytes_over, plan.engine_bytes_over),
    )


def _publish_s(config: GrpoRunConfig, plan: ResourcePlan, assumptions: Assumptions) -> float:
    nbytes = published_bytes(plan.shape, config.learner)
    if config.weights.transport == "shm":
        return PUBLISH_OVERHEAD_S + 2 * nbytes / (assumptions.shm_gbps * 1e9)
    link = assumptions.node_gbps if count_gpus(config) <= GPUS_PER_NODE else assumptions.network_gbps
    return PUBLISH_OVERHEAD_S + nbytes / (link * 1e9)


def count_gpus(config: GrpoRunConfig) -> int:
    """Return the number of GPUs of engines and learner."""
    engines = 0 if config.shares_gpus else config.rollout.worker_limit * config.rollout.engine.tensor_parallel_size
    return config.learner.world_size + engines


def _candidates(config: GrpoRunConfig, num_gpus: int) -> Iterator[dict[str, object]]:
    """Yield settings of every split, with and without staleness, and of the colocated mode."""
    size = config.rollout.engine.tensor_parallel_size
    shared: dict[str, object] = {"rollout.max_workers": 0}
    split = {**shared, "train.colocate": False}
    if config.shares_gpus:
        split["weights.transport"] = "nccl"
    for engines in range(1, (num_gpus - 1) // size + 1):
        counts = {"rollout.num_workers": engines, "learner.world_size": num_gpus - engines * size}
        yield {**split, **counts, "train.max_staleness": 0}
        stale: dict[str, object] = {"train.max_staleness": 1, "learner.old_logprobs": "recompute"}
        if config.learner.loss.tis_cap is None:
            stale["learner.loss.tis_cap"] = 2.0
        yield {**split, **counts, **stale}
    if size == 1:
        counts = {"rollout.num_workers": num_gpus, "learner.world_size": num_gpus}
        yield {**shared, **counts, "train.colocate": True, "weights.transport": "ipc", "train.max_staleness": 0}


def _time_with(
    config: GrpoRunConfig, settings: Mapping[str, object], plan: ResourcePlan, assumptions: Assumptions
) -> StepTime | None:
    """Return the step time with other settings; None if the config does not allow them."""
    try:
        changed = with_values(config, settings)
        candidate = step_time(changed, make_plan(changed, assumptions, plan.shape), assumptions)
    except (UserError, ValueError):
        return None
    return StepTime(
        **{name: getattr(candidate, name) for name in StepTime.__slots__ if name != "settings"},
        settings=tuple(format_setting(key, value) for key, value in settings.items() if _value(config, key) != value),
    )


def _value(section: object, key: str) -> object:
    for name in key.split("."):
        section = getattr(section, name)
    return section


def _order(candidate: StepTime | None) -> tuple[bool, float]:
    """Sort key: what fits before what does not, then the faster."""
    return (True, math.inf) if candidate is None else (not candidate.fits, candidate.seconds)


def _recommend(configured: StepTime, alternatives: list[StepTime]) -> tuple[StepTime, str]:
    fitting = [candidate for candidate in (configured, *alternatives) if candidate.fits]
    if not fitting:
        return configured, "no use of these GPUs fits; see the changes below"
    fastest = min(fitting, key=lambda candidate: candidate.seconds)
    on_policy = min(
        (candidate for candidate in fitting if not candidate.max_staleness),
        key=lambda candidate: candidate.seconds,
        default=fastest,
    )
    if on_policy is fastest:
        return fastest, "the fastest that fits, and on policy"
    saved = 1 - fastest.seconds / on_policy.seconds
    if saved <= PREFER_ON_POLICY:
        return on_policy, f"on policy, and staleness 1 would save only {saved:.0%} of the step"
    return fastest, f"it saves {saved:.0%} of the fastest step on policy, at a staleness of up to 1 update"
