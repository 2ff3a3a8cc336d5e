"""Resource plan of a run: token budgets, memory and FLOPs from its config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from vz_ray.config import load_config
from vz_ray.config.load import sets_section
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.families import ModelShape, load_model_shape, processor_max_pixels
from vz_ray.planning import learner_flops
from vz_ray.planning.activation_memory import is_tiled
from vz_ray.planning.assumptions import Assumptions
from vz_ray.planning.colocation import state_bytes, take_turns
from vz_ray.planning.engine_memory import EngineMemory, engine_memory
from vz_ray.planning.episode_budget import EpisodeBudget, episode_budget, longest_episode
from vz_ray.planning.gpu_memory import MemoryFootprint
from vz_ray.planning.learner_activations import WorstCaseBatch
from vz_ray.planning.learner_memory import (
    learner_footprint,
    learner_host_bytes,
    snapshot_bytes,
    weight_dtype_bytes,
    worst_case_batch,
)
from vz_ray.planning.model_flops import BACKWARD_FACTOR, FROZEN_BACKWARD_FACTOR
from vz_ray.planning.published_weights import check_published_adapters
from vz_ray.planning.sequence_parallel import check_sequence_parallel
from vz_ray.planning.teacher import TeacherPlan, plan_teacher
from vz_ray.planning.trainable_params import TrainableParams, count_trainable_params
from vz_ray.utils.errors import UserError

PlannableConfig: TypeAlias = GrpoRunConfig | SftRunConfig


@dataclass(frozen=True, slots=True)
class ResourcePlan:
    """Resources of a run.

    Attributes:
        command: `train` or `sft`.
        model: Model as named in the config.
        shape: Shape of the model.
        trainable_params: Number of parameters with gradients, including adapters.
        longest: Longest episode that the config allows.
        typical: Typical episode under the assumptions.
        worst_case: Largest micro-batch.
        weight_bytes: Bytes of a weight in the learner.
        learner: Memory of each rank's GPU.
        engine: Memory of each engine; None without rollout.
        shared_gpu: Memory of a GPU that learner and engine share at the same time, with `weights.transport: ipc`.
        handover: Memory of a GPU that they share in turns, with `train.colocate`, while weights pass to the engine.
        host_bytes: Maximum host memory of a rank.
        batch_size: Groups per training step, or samples per SFT step.
        group_size: Samples per group.
        passes: Passes of each batch through the model.
        unpacked_work: FLOPs and time of a step with one sequence per trajectory.
        packed_work: The same with shared prefixes; None if a group has one sample.
        branches_per_sequence: Branches of each packed sequence of a group.
        notes: Further remarks.
        teacher: Memory and time of the teacher; None without one.
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
    handover: MemoryFootprint | None
    host_bytes: int
    batch_size: int
    group_size: int
    passes: learner_flops.PassCounts
    unpacked_work: learner_flops.LearnerWork
    packed_work: learner_flops.LearnerWork | None
    branches_per_sequence: tuple[int, ...]
    notes: tuple[str, ...]
    teacher: TeacherPlan | None

    @property
    def footprints(self) -> list[MemoryFootprint]:
        """Memory of each kind of GPU, or of the same GPU in each turn."""
        footprints = [self.learner, self.handover, self.engine.footprint if self.engine is not None else None]
        if self.shared_gpu is not None:
            footprints = [self.shared_gpu]
        footprints.append(self.teacher.footprint if self.teacher is not None else None)
        return [footprint for footprint in footprints if footprint is not None]

    @property
    def fits(self) -> bool:
        """Whether every GPU has enough memory."""
        teacher_fits = self.teacher is None or self.teacher.bytes_over <= 0
        return self.learner_bytes_over <= 0 and self.engine_bytes_over <= 0 and teacher_fits

    @property
    def learner_bytes_over(self) -> int:
        """Bytes that a rank's GPU lacks; negative if memory is left."""
        handover = self.handover.bytes_over if self.handover else self.learner.bytes_over
        return max(handover, (self.shared_gpu or self.learner).bytes_over)

    @property
    def engine_bytes_over(self) -> int:
        """Bytes that an engine's GPU lacks to start; negative if memory is left."""
        if self.engine is None:
            return -self.learner.capacity_bytes
        return self.engine.bytes_over


def load_plannable_config(path: Path | str, overrides: list[str]) -> PlannableConfig:
    """Load the config of a `train` or `sft` run; a key `sft` selects the latter.

    Raises:
        UserError: A key or value is invalid.
    """
    schema: type[PlannableConfig] = SftRunConfig if sets_section(path, overrides, "sft") else GrpoRunConfig
    return load_config(schema, path, overrides)


def make_plan(config: PlannableConfig, assumptions: Assumptions, shape: ModelShape | None = None) -> ResourcePlan:
    """Plan a run.

    Args:
        config: Config of the run.
        assumptions: GPU memory, compute rate and typical episode.
        shape: Shape of the model; default: that of `config.model`.

    Raises:
        UserError: The model is unknown, the overview fills the context, or a LoRA target matches no layer.
    """
    shape = shape or load_model_shape(config.model)
    try:
        longest = longest_episode(config.episode, shape.vision)
        typical = episode_budget(
            config.episode, shape.vision, zooms=assumptions.zooms, turn_tokens=assumptions.turn_tokens
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    learner_config = replace(config.learner, model=config.model)
    check_sequence_parallel(shape, learner_config.sequence_parallel_size)
    check_published_adapters(shape, learner_config.lora)
    params = count_trainable_params(shape, learner_config)
    uses_reference = learner_config.loss.kl_coef > 0
    has_reference = uses_reference and learner_config.needs_separate_reference
    batch_size, group_size = _batch(config)
    worst_case = worst_case_batch(learner_config, longest, typical, group_size)
    learner = learner_footprint(shape, learner_config, worst_case, assumptions.gpu_bytes, has_reference=has_reference)
    engine = _engine(config, shape, longest, assumptions.gpu_bytes)
    host_bytes = learner_host_bytes(shape, learner_config, has_reference=has_reference)
    if isinstance(config, GrpoRunConfig) and updates_per_step(config) * learner_config.epochs > 1:
        host_bytes += snapshot_bytes(params, learner_config)
    handover = None
    if engine is not None and isinstance(config, GrpoRunConfig) and config.train.colocate:
        host_bytes += state_bytes(learner)
        if config.sleep_level == 1:
            host_bytes += 2 * shape.parameters
        all_weights = not learner_config.lora.publishes_adapters
        largest_tensor = shape.text.vocab_size * shape.text.hidden if all_weights else params.largest_tensor
        learner, engine, handover = take_turns(learner, engine, weight_dtype_bytes(learner_config) * largest_tensor)
    passes = _passes(config, batch_size, uses_reference, shape, params, worst_case)
    rate = learner_flops.ComputeRate(learner_config.world_size, assumptions.peak_tflops * 1e12, assumptions.mfu)
    max_tokens = max(learner_config.micro_batch_tokens, typical.tokens)
    packed = learner_flops.packed_work(shape, typical, batch_size, group_size, max_tokens, passes, rate)
    return ResourcePlan(
        command="train" if isinstance(config, GrpoRunConfig) else "sft",
        model=config.model,
        shape=shape,
        trainable_params=params.trainable,
        longest=longest,
        typical=typical,
        worst_case=worst_case,
        weight_bytes=weight_dtype_bytes(learner_config),
        learner=learner,
        engine=engine,
        shared_gpu=_shared_gpu(config, learner, engine),
        handover=handover,
        host_bytes=host_bytes,
        batch_size=batch_size,
        group_size=group_size,
        passes=passes,
        unpacked_work=learner_flops.unpacked_work(shape, typical, batch_size * group_size, passes, rate),
        packed_work=packed if group_size > 1 else None,
        branches_per_sequence=tuple(learner_flops.split_group(typical, group_size, max_tokens)),
        notes=tuple(_notes(config, longest, engine)),
        teacher=plan_teacher(config, shape, longest, typical, assumptions)
        if isinstance(config, GrpoRunConfig)
        else None,
    )


def _batch(config: PlannableConfig) -> tuple[int, int]:
    """Return batch size and group size."""
    if isinstance(config, GrpoRunConfig):
        return config.train.batch_size, config.train.group_size
    return config.sft.batch_size, 1


def updates_per_step(config: PlannableConfig) -> int:
    """Return the optimizer steps of a training step: one per mini-batch."""
    if isinstance(config, GrpoRunConfig):
        return -(-config.train.batch_size // config.learner.mini_batch_size)
    return 1


def _passes(
    config: PlannableConfig,
    batch_size: int,
    uses_reference: bool,
    shape: ModelShape,
    params: TrainableParams,
    worst_case: WorstCaseBatch,
) -> learner_flops.PassCounts:
    """Count the passes of `vz_ray.learner`; a single update reuses its forward pass for old log-probs."""
    learner = config.learner
    forward_only, epochs = 0, 1
    if isinstance(config, GrpoRunConfig):
        epochs = learner.epochs
        single_update = batch_size <= learner.mini_batch_size and epochs == 1
        recompute = learner.old_logprobs == "recompute" and not single_update
        forward_only = int(recompute) + int(uses_reference)
    text_factor = FROZEN_BACKWARD_FACTOR if learner.lora.rank else BACKWARD_FACTOR
    vision_factor = text_factor if params.vision else 0
    tiled = is_tiled(worst_case.tokens, learner.mlp_tile_tokens) and not learner.gradient_checkpointing
    return learner_flops.PassCounts(
        updates=epochs,
        forward_only=forward_only,
        checkpointing=learner.gradient_checkpointing,
        text_backward_factor=text_factor,
        vision_backward_factor=vision_factor,
        vision_slices=0 < learner.vision_slice_patches < worst_case.patches,
        tiled_share=shape.text.mlp_share if tiled else 0.0,
    )


def _engine(config: PlannableConfig, shape: ModelShape, longest: EpisodeBudget, gpu_bytes: int) -> EngineMemory | None:
    if not isinstance(config, GrpoRunConfig):
        return None
    return engine_memory(
        shape,
        config.rollout.engine,
        longest,
        gpu_bytes,
        num_engines=config.rollout.worker_limit,
        group_size=config.train.group_size,
        max_image_pixels=processor_max_pixels(config.model),
    )


def _shared_gpu(
    config: PlannableConfig, learner: MemoryFootprint, engine: EngineMemory | None
) -> MemoryFootprint | None:
    if engine is None or not isinstance(config, GrpoRunConfig) or not config.shares_gpus or config.train.colocate:
        return None
    items = (*learner.items, *engine.footprint.items)
    return MemoryFootprint("learner and engine", learner.num_gpus, learner.capacity_bytes, items)


def _notes(config: PlannableConfig, longest: EpisodeBudget, engine: EngineMemory | None) -> list[str]:
    notes = []
    if longest.untruncated_tokens > longest.tokens:
        notes.append(
            f"the longest episode has {longest.untruncated_tokens:,} tokens; episode.max_context truncates it "
            f"to {longest.tokens:,}"
        )
    if config.learner.dtype == "auto" and config.learner.zero_stage == 0:
        notes.append("learner.zero_stage 0 trains float32 only; on GPUs set learner.dtype=float32 or a higher stage")
    if isinstance(config, GrpoRunConfig) and engine is not None:
        concurrent = min(config.rollout.max_concurrent_episodes, config.rollout.engine.max_num_seqs)
        if engine.can_start and engine.max_episodes_shared_prefix < concurrent:
            notes.append(
                f"an engine's KV cache holds {engine.max_episodes_shared_prefix} longest episodes, fewer than "
                f"its {concurrent} concurrent episodes; if all grow that long, vLLM preempts and recomputes some"
            )
    return notes
