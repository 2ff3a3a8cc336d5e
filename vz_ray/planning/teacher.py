"""Memory and speed of the teacher of on-policy distillation.

The teacher has its own GPUs. It scores each group when its rollout ends: one prefill per episode, without sampling. The
prompt is assumed to be computed once per group, and no sample to begin with the tokens of another one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vz_ray.config.run import GrpoRunConfig
from vz_ray.families import ModelShape, load_model_shape, processor_max_pixels
from vz_ray.planning.assumptions import Assumptions
from vz_ray.planning.engine_memory import EngineMemory, engine_memory
from vz_ray.planning.engine_speed import EngineSpeed
from vz_ray.planning.episode_budget import EpisodeBudget
from vz_ray.planning.gpu_memory import Certainty, MemoryFootprint, MemoryItem
from vz_ray.utils.errors import UserError

PROMPT_LOGITS_ROWS = 1024
"""Prompt tokens for which vLLM's second model runner holds logits at a time."""


@dataclass(frozen=True, slots=True)
class TeacherPlan:
    """Resources of the teacher.

    Attributes:
        memory: Memory of each engine.
        step_s: Time of all engines to score the groups of a step; most of it overlaps with the rollout.
        group_s: Time of one engine to score a group: the part after the last rollout.
    """

    memory: EngineMemory
    step_s: float
    group_s: float

    @property
    def footprint(self) -> MemoryFootprint:
        return self.memory.footprint

    @property
    def num_gpus(self) -> int:
        return self.footprint.num_gpus

    @property
    def bytes_over(self) -> int:
        """Bytes that an engine's GPU lacks to start; negative if memory is left."""
        return self.memory.bytes_over


def plan_teacher(
    config: GrpoRunConfig,
    student: ModelShape,
    longest: EpisodeBudget,
    typical: EpisodeBudget,
    assumptions: Assumptions,
) -> TeacherPlan | None:
    """Plan the teacher of a run; None without one.

    Raises:
        UserError: The teacher is unknown, or its visual tokens have another size than the student's.
    """
    teacher = config.teacher
    if not teacher.enabled:
        return None
    shape = load_model_shape(teacher.model)
    sides = (shape.vision.token_side, student.vision.token_side)
    if sides[0] != sides[1]:
        raise UserError(
            f"teacher.model {teacher.model} has visual tokens of {sides[0]} x {sides[0]} pixels, and model "
            f"{config.model} of {sides[1]} x {sides[1]}; use a teacher of the student's family"
        )
    memory = engine_memory(
        shape,
        replace(
            teacher.engine,
            max_num_seqs=teacher.max_concurrent_episodes,
            max_model_len=teacher.engine.max_model_len + 1,
            adapter_rank=0,
        ),
        longest,
        assumptions.gpu_bytes,
        num_engines=teacher.worker_limit,
        group_size=1,
        max_image_pixels=processor_max_pixels(teacher.model),
    )
    # Logits, their copy under mask and temperature, and log-probs, in float32. vLLM does not profile them.
    logits = MemoryItem(
        "logits of prompt tokens", 3 * 4 * PROMPT_LOGITS_ROWS * shape.text.vocab_size, Certainty.ESTIMATE
    )
    footprint = replace(memory.footprint, component="teacher", items=(*memory.footprint.items, logits))
    speed = EngineSpeed.of_gpus(shape, assumptions, teacher.engine.tensor_parallel_size)
    prefix_s = speed.prefill_s(typical.prefix_tokens, typical.overview_frames, typical.frame.tokens)
    branch_s = speed.prefill_s(typical.branch_tokens, typical.zoom_frames, typical.frame.tokens)
    group_s = prefix_s + config.train.group_size * branch_s
    step_s = config.train.batch_size * group_s / teacher.worker_limit
    return TeacherPlan(replace(memory, footprint=footprint), step_s, group_s)
