"""Timeouts that follow from the plan of a run.

A timeout that the config leaves null is `SAFETY_FACTOR` times the time that the plan computes for the worst case,
and at least its minimum in `vz_ray.config.timeouts`. A timeout that the config sets is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vz_ray.config.fields import set_derived_values
from vz_ray.config.run import GrpoRunConfig, RolloutRunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.config.timeouts import PLANNED_TIMEOUTS
from vz_ray.families import ModelShape, load_model_shape, processor_max_pixels
from vz_ray.planning.assumptions import Assumptions
from vz_ray.planning.engine_memory import EngineMemory, engine_memory
from vz_ray.planning.engine_speed import EngineSpeed
from vz_ray.planning.episode_budget import longest_episode
from vz_ray.planning.learner_time import learner_time
from vz_ray.planning.planner import make_plan
from vz_ray.planning.published_weights import published_bytes
from vz_ray.utils.errors import UserError

SAFETY_FACTOR = 2.0
"""Timeout relative to the computed time. It covers assumptions that are too optimistic and noise."""
ENGINE_START_S = 120.0
"""Assumed start of an engine without reading the weights: imports, profiling, CUDA graphs."""
CHECKPOINT_BYTES = 14
"""Bytes of a checkpoint per trained parameter: a bfloat16 weight, its float32 copy and two moments."""

TimeoutRunConfig = RolloutRunConfig | SftRunConfig
"""Config of a run whose timeouts are planned."""
Derived = tuple[float, str]
"""Derived seconds, and how they are computed."""


@dataclass(frozen=True, slots=True)
class PlannedTimeout:
    """A timeout of a run.

    Attributes:
        key: Key in the section `timeouts`.
        seconds: Its value.
        reason: Where the value comes from.
    """

    key: str
    seconds: float
    reason: str

    def __str__(self) -> str:
        return f"timeouts.{self.key} is {self.seconds:.0f} s: {self.reason}"


def plan_timeouts(
    config: TimeoutRunConfig, assumptions: Assumptions, shape: ModelShape | None = None
) -> list[PlannedTimeout]:
    """Return every timeout that this run uses.

    Args:
        config: Config of the run.
        assumptions: GPUs and their speed.
        shape: Shape of the model; default: that of `config.model`.

    Raises:
        UserError: The run cannot be planned, for example because the planner does not know the model's family.
    """
    shape = shape or load_model_shape(config.model)
    timeouts: list[PlannedTimeout] = []
    if isinstance(config, RolloutRunConfig):
        engine = _engine_memory(config, assumptions, shape)
        engine_start, turn_time = _engine_start(assumptions, shape), _turn(config, engine, assumptions, shape)
        if isinstance(config, GrpoRunConfig) and config.teacher.enabled:
            teacher = load_model_shape(config.teacher.model)
            engine_start = max(engine_start, _engine_start(assumptions, teacher))
            turn_time = max(turn_time, _score(config, assumptions, teacher))
        turn = _choose(config, "turn_s", turn_time)
        timeouts += [
            _choose(config, "engine_start_s", engine_start),
            turn,
            _choose(config, "episode_s", _episode(config, turn.seconds)),
        ]
    if isinstance(config, GrpoRunConfig):
        publish = _publish(config, assumptions, shape)
        timeouts.append(_choose(config, "publish_s", publish))
    if isinstance(config, GrpoRunConfig | SftRunConfig):
        timeouts.append(_choose(config, "learner_call_s", _learner_call(config, assumptions, shape)))
    return timeouts


def plan_stop(
    config: GrpoRunConfig | SftRunConfig, assumptions: Assumptions, shape: ModelShape | None = None
) -> Derived:
    """Return the longest time from a stop request to the end of the checkpoint, and how it is computed.

    A GRPO step is dropped before its next micro-batch, an SFT step is completed.
    """
    shape = shape or load_model_shape(config.model)
    plan = make_plan(config, assumptions, shape)
    step_s = learner_time(config, plan, plan.longest, assumptions).seconds
    work_s, work = step_s, "a step"
    if isinstance(config, GrpoRunConfig):
        tokens = plan.batch_size * plan.group_size * plan.longest.tokens
        ranks = config.learner.world_size // config.learner.sequence_parallel_size
        work_s, work = step_s * min(1.0, config.learner.micro_batch_tokens * ranks / tokens), "a micro-batch"
    checkpoint_s = CHECKPOINT_BYTES * plan.trainable_params / (assumptions.storage_gbps * 1e9)
    return _with_margin(work_s + checkpoint_s, f"{work}, {work_s:.0f} s, and a checkpoint, {checkpoint_s:.0f} s")


def minimum_timeouts(config: TimeoutRunConfig, reason: str) -> list[PlannedTimeout]:
    """Return the timeouts of a run that cannot be planned: those of the config, else the minimums."""
    values: Mapping[str, float | None] = {key: getattr(config.timeouts, key) for key in PLANNED_TIMEOUTS}
    return [
        PlannedTimeout(key, value, "set in the config")
        if value is not None
        else PlannedTimeout(key, PLANNED_TIMEOUTS[key], f"the minimum; {reason}")
        for key, value in values.items()
    ]


def apply_timeouts(config: TimeoutRunConfig, timeouts: Sequence[PlannedTimeout]) -> None:
    """Set the timeouts in `config`, and in the sections that follow them."""
    config.timeouts = replace(config.timeouts, **{timeout.key: timeout.seconds for timeout in timeouts})
    set_derived_values(config)


def _choose(config: TimeoutRunConfig, key: str, derived: Derived) -> PlannedTimeout:
    """Return the value of the config, else the derived one, at least the minimum."""
    configured: float | None = getattr(config.timeouts, key)
    if configured is not None:
        return PlannedTimeout(key, configured, "set in the config")
    seconds, reason = derived
    minimum = PLANNED_TIMEOUTS[key]
    if seconds <= minimum:
        return PlannedTimeout(key, minimum, f"the minimum; {seconds:.0f} s would be {reason}")
    return PlannedTimeout(key, float(math.ceil(seconds)), reason)


def _with_margin(seconds: float, reason: str) -> Derived:
    return SAFETY_FACTOR * seconds, f"{SAFETY_FACTOR:g} x ({reason})"


def _engine_memory(config: RolloutRunConfig, assumptions: Assumptions, shape: ModelShape) -> EngineMemory:
    try:
        longest = longest_episode(config.episode, shape.vision)
    except ValueError as error:
        raise UserError(str(error)) from error
    return engine_memory(
        shape,
        config.rollout.engine,
        longest,
        assumptions.gpu_bytes,
        num_engines=config.rollout.worker_limit,
        group_size=config.train.group_size if isinstance(config, GrpoRunConfig) else 1,
        max_image_pixels=processor_max_pixels(config.model),
    )


def _turn(config: RolloutRunConfig, engine: EngineMemory, assumptions: Assumptions, shape: ModelShape) -> Derived:
    """Every concurrent episode is of maximum length and samples a turn of maximum length at the same time.

    Sequences that do not fit the KV cache wait for others.
    """
    episode, rollout = longest_episode(config.episode, shape.vision), config.rollout
    speed = EngineSpeed.of_gpus(shape, assumptions, rollout.engine.tensor_parallel_size)
    concurrent = rollout.max_concurrent_episodes
    resident = max(1, min(concurrent, engine.max_episodes_shared_prefix))
    waves, turn_tokens = math.ceil(concurrent / resident), config.episode.max_turn_tokens
    token_s = speed.step_s(resident, episode.tokens)
    prefill_s = speed.prefill_s(episode.tokens, episode.frames, episode.frame.tokens)
    reason = (
        f"{waves} x {turn_tokens:,} tokens at {1000 * token_s:.0f} ms for {resident} of {concurrent} sequences of "
        f"{episode.tokens:,} tokens, after {concurrent} prefills of {prefill_s:.1f} s"
    )
    return _with_margin(waves * turn_tokens * token_s + concurrent * prefill_s, reason)


def _score(config: GrpoRunConfig, assumptions: Assumptions, shape: ModelShape) -> Derived:
    """Every concurrent episode of a teacher worker is of maximum length."""
    teacher, episode = config.teacher, longest_episode(config.episode, shape.vision)
    speed = EngineSpeed.of_gpus(shape, assumptions, teacher.engine.tensor_parallel_size)
    prefill_s = speed.prefill_s(episode.tokens, episode.frames, episode.frame.tokens)
    count = teacher.max_concurrent_episodes
    return _with_margin(count * prefill_s, f"the teacher's scores of {count} episodes, {prefill_s:.1f} s each")


def _episode(config: RolloutRunConfig, turn_s: float) -> Derived:
    """Timeouts of turns and clips have their own safety factor."""
    rounds, decode_s = config.episode.max_rounds, config.timeouts.decode_s
    return rounds * (turn_s + decode_s), f"{rounds} x (turn_s, {turn_s:.0f} s, and decode_s, {decode_s:.0f} s)"


def _engine_start(assumptions: Assumptions, shape: ModelShape) -> Derived:
    nbytes, rate = 2 * shape.parameters, assumptions.storage_gbps
    reason = f"{nbytes / 1e9:.1f} GB of weights at {rate:g} GB/s, and {ENGINE_START_S:.0f} s"
    return _with_margin(nbytes / (rate * 1e9) + ENGINE_START_S, reason)


def _publish(config: GrpoRunConfig, assumptions: Assumptions, shape: ModelShape) -> Derived:
    """The slower of writing to shared memory, and of all workers pulling from one node."""
    workers, nbytes = config.rollout.worker_limit, published_bytes(shape, config.learner)
    write_s = nbytes / (assumptions.shm_gbps * 1e9)
    pull_s = workers * nbytes / (assumptions.network_gbps * 1e9)
    reason = f"{nbytes / 1e9:.1f} GB to shared memory at {assumptions.shm_gbps:g} GB/s"
    if pull_s > write_s:
        reason = f"{workers} workers that read {nbytes / 1e9:.1f} GB from one node at {assumptions.network_gbps:g} GB/s"
    return _with_margin(max(write_s, pull_s), reason)


def _learner_call(config: GrpoRunConfig | SftRunConfig, assumptions: Assumptions, shape: ModelShape) -> Derived:
    """The slower of a step on the longest episodes, and of writing a checkpoint."""
    plan = make_plan(config, assumptions, shape)
    step_s = learner_time(config, plan, plan.longest, assumptions).seconds
    nbytes = CHECKPOINT_BYTES * plan.trainable_params
    checkpoint_s = nbytes / (assumptions.storage_gbps * 1e9)
    if checkpoint_s > step_s:
        return _with_margin(checkpoint_s, f"a checkpoint of {nbytes / 1e9:.0f} GB at {assumptions.storage_gbps:g} GB/s")
    count = plan.batch_size * plan.group_size
    reason = f"a step on {count:,} trajectories of {plan.longest.tokens:,} tokens on {config.learner.world_size} GPUs"
    return _with_margin(step_s, reason)
