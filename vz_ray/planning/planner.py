"""From a config to what it will take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import yaml

from vz_ray.config import load_config
from vz_ray.config.load import EXTENDS
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.planning import learner_flops
from vz_ray.planning.engine_memory import EngineMemory, engine_memory
from vz_ray.planning.episode_budget import EpisodeBudget, episode_budget, longest_episode
from vz_ray.planning.gpu_memory import GIB, MemoryFootprint
from vz_ray.planning.learner_memory import (
    WorstCaseBatch,
    learner_footprint,
    learner_host_bytes,
    weight_bytes_of,
    worst_case_batch,
)
from vz_ray.planning.model_flops import BACKWARD_FACTOR, FROZEN_BACKWARD_FACTOR
from vz_ray.planning.model_shape import ModelShape, load_model_shape, processor_max_pixels
from vz_ray.planning.trainable_params import TrainableParams, count_trainable_params
from vz_ray.utils.errors import UserError

PlannableConfig: TypeAlias = GrpoRunConfig | SftRunConfig

H100_PEAK_TFLOPS = 989.0
"""Dense bfloat16 of an H100 SXM, as its maker says."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What no config says.

    Attributes:
        gpu_bytes: Memory of each GPU.
        peak_tflops: Of each GPU, in the learner's arithmetic.
        mfu: Share of it that the learner reaches.
        zooms: Of a usual episode; the paper's have two on average.
        turn_tokens: Sampled in one of its turns.
    """

    gpu_bytes: int = 80 * GIB
    peak_tflops: float = H100_PEAK_TFLOPS
    mfu: float = 0.35
    zooms: int = 2
    turn_tokens: int = 170

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu is {self.mfu}; it is a share of the peak, above 0 and at most 1")
        if self.peak_tflops <= 0:
            raise UserError(f"--peak-tflops is {self.peak_tflops}; it must be above 0")
        for option, value in (("--zooms", self.zooms), ("--turn-tokens", self.turn_tokens)):
            if value < (option == "--turn-tokens"):
                raise UserError(f"{option} is {value}; it is too small")


@dataclass(frozen=True, slots=True)
class ResourcePlan:
    """What a run takes.

    Attributes:
        command: `train` or `sft`.
        model: As the config names it.
        shape: Of that.
        trainable_params: Weights that have gradients, those of adapters among them.
        longest: The longest episode that the config allows.
        typical: An episode as assumed.
        worst_case: The largest micro-batch.
        weight_bytes: Bytes of a weight in the learner.
        learner: Of each rank's GPU.
        engine: Of each engine, where episodes are played.
        shared_gpu: Of the one GPU that both share, with weights.transport ipc.
        host_bytes: Most host memory of a rank, bytes.
        batch_size: In an iteration, or a step of sft.
        group_size: In a group.
        passes: How often each goes through the model.
        unpacked_work: An iteration's arithmetic, each trajectory as a sequence of its own.
        packed_work: The same with shared prefixes; None where a group has one sample.
        branches_per_sequence: Branches of each sequence that a group is packed into.
        notes: What a reader should know besides.
    """

    command: str
    model: str
    shape: ModelShape
    trainable_params: int
    longest: EpisodeBudget
    typical: EpisodeBudget
    worst_case: WorstCaseBatch
    weight_bytes: int
    learner: MemoryFootprint
    engine: EngineMemory | None
    shared_gpu: MemoryFootprint | None
    host_bytes: int
    batch_size: int
    group_size: int
    passes: learner_flops.PassCounts
    unpacked_work: learner_flops.LearnerWork
    packed_work: learner_flops.LearnerWork | None
    branches_per_sequence: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether every GPU holds what it must."""
        return self.learner_bytes_over <= 0 and self.engine_bytes_over <= 0

    @property
    def learner_bytes_over(self) -> int:
        """Bytes that a rank's GPU lacks; negative where there is room."""
        return (self.shared_gpu or self.learner).bytes_over

    @property
    def engine_bytes_over(self) -> int:
        """Bytes that an engine's GPU lacks to start; negative where there is room."""
        if self.engine is None:
            return -self.learner.capacity_bytes
        lacking = (self.engine.min_kv_tokens - self.engine.kv_tokens) * self.engine.kv_bytes_per_token
        return max(self.engine.footprint.bytes_over, lacking)


def load_plannable_config(path: Path | None, overrides: list[str]) -> PlannableConfig:
    """The config of a run of `train` or `sft`, whichever its keys belong to.

    Raises:
        UserError: A wrong key or value.
    """
    supervised = _has_key(path, "sft") or any(one.split("=")[0].split(".")[0] == "sft" for one in overrides)
    schema: type[PlannableConfig] = SftRunConfig if supervised else GrpoRunConfig
    return load_config(schema, path, overrides)


def _has_key(path: Path | None, key: str) -> bool:
    """Whether a YAML file, or one that it extends, has `key`; what else is wrong with it `load` says."""
    if path is None or not path.is_file():
        return False
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        return False
    if not isinstance(values, dict):
        return False
    base = values.get(EXTENDS)
    return key in values or (isinstance(base, str) and _has_key(path.parent / base, key))


def make_plan(config: PlannableConfig, assumed: Assumptions, shape: ModelShape | None = None) -> ResourcePlan:
    """What a run of `config` takes; `shape` stands in for that of its model.

    Raises:
        UserError: The model is not known, its episodes do not fit their context, or a target of
            learner.lora is none of its layers.
    """
    shape = shape or load_model_shape(config.model)
    try:
        most = longest_episode(config.episode, shape.vision)
        usual = episode_budget(
            config.episode, shape.vision, zooms=assumed.zooms, turn_tokens=assumed.turn_tokens
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    played = isinstance(config, GrpoRunConfig)
    settings = replace(config.learner, model=config.model)
    trained = count_trainable_params(shape, settings)
    scored = settings.loss.kl_coef > 0
    reference = scored and settings.needs_separate_reference
    groups, samples = _batch(config)
    largest = worst_case_batch(settings, most, usual, samples)
    learner = learner_footprint(shape, settings, largest, assumed.gpu_bytes, has_reference=reference)
    engine = _engine(config, shape, most, assumed.gpu_bytes) if isinstance(config, GrpoRunConfig) else None
    passes = _passes(config, groups, scored, trained)
    rate = learner_flops.ComputeRate(settings.world_size, assumed.peak_tflops * 1e12, assumed.mfu)
    budget = max(settings.micro_batch_tokens, usual.tokens)
    packed = learner_flops.packed_work(shape, usual, groups, samples, budget, passes, rate)
    return ResourcePlan(
        command="train" if played else "sft",
        model=config.model,
        shape=shape,
        trainable_params=trained.trainable,
        longest=most,
        typical=usual,
        worst_case=largest,
        weight_bytes=weight_bytes_of(settings),
        learner=learner,
        engine=engine,
        shared_gpu=_together(config, learner, engine),
        host_bytes=learner_host_bytes(shape, settings, has_reference=reference),
        batch_size=groups,
        group_size=samples,
        passes=passes,
        unpacked_work=learner_flops.unpacked_work(shape, usual, groups * samples, passes, rate),
        packed_work=packed if samples > 1 else None,
        branches_per_sequence=tuple(learner_flops.split_group(usual, samples, budget)),
        notes=tuple(_notes(config, most, engine)),
    )


def _batch(config: PlannableConfig) -> tuple[int, int]:
    """Groups, and samples in each."""
    if isinstance(config, GrpoRunConfig):
        return config.train.batch_size, config.train.group_size
    return config.sft.batch_size, 1


def _passes(
    config: PlannableConfig, groups: int, scored: bool, trained: TrainableParams
) -> learner_flops.PassCounts:
    """As `vz_ray.learner.trainer` makes them: one update has its old log-probs from its own forward pass."""
    learner = config.learner
    scores, epochs = 0, 1
    if isinstance(config, GrpoRunConfig):
        epochs = learner.epochs
        once = groups <= learner.mini_batch_size and epochs == 1
        scores = int(learner.old_logprobs == "recompute" and not once) + int(scored)
    backward = FROZEN_BACKWARD_FACTOR if learner.lora.rank else BACKWARD_FACTOR
    vision = backward if trained.vision else 0
    return learner_flops.PassCounts(epochs, scores, learner.gradient_checkpointing, backward, vision)


def _engine(config: GrpoRunConfig, shape: ModelShape, most: EpisodeBudget, capacity: int) -> EngineMemory:
    return engine_memory(
        shape,
        config.rollout.engine,
        most,
        capacity,
        num_engines=config.rollout.worker_limit,
        group_size=config.train.group_size,
        max_image_pixels=processor_max_pixels(config.model),
    )


def _together(
    config: PlannableConfig, learner: MemoryFootprint, engine: EngineMemory | None
) -> MemoryFootprint | None:
    if engine is None or not isinstance(config, GrpoRunConfig) or config.weights.transport != "ipc":
        return None
    parts = (*learner.items, *engine.footprint.items)
    return MemoryFootprint("learner and engine", 1, learner.capacity_bytes, parts)


def _notes(config: PlannableConfig, most: EpisodeBudget, engine: EngineMemory | None) -> list[str]:
    notes = []
    if most.untruncated_tokens > most.tokens:
        notes.append(
            f"the longest episode would have {most.untruncated_tokens:,} tokens, episode.max_context cuts it to "
            f"{most.tokens:,}"
        )
    if config.learner.dtype == "auto" and config.learner.zero_stage == 0:
        notes.append(
            "learner.zero_stage 0 trains float32 alone: on GPUs set learner.dtype=float32, or a stage"
        )
    if isinstance(config, GrpoRunConfig) and engine is not None:
        seats = min(config.rollout.max_concurrent_episodes, config.rollout.engine.max_num_seqs)
        if engine.can_start and engine.max_episodes_shared_prefix < seats:
            notes.append(
                f"{engine.max_episodes_shared_prefix} longest episodes fit an engine's key/value cache at a time, and {seats} "
                "may be played: if so many grow so long, vLLM puts some back and computes them again"
            )
    return notes
