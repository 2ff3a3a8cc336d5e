"""From a config to what it will take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import yaml

from vz_ray.config import load
from vz_ray.config.load import EXTENDS
from vz_ray.config.run import RunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.observe.errors import UserError
from vz_ray.plan import work
from vz_ray.plan.budget import EpisodeBudget, episode_budget, longest
from vz_ray.plan.engine import EngineMemory, engine_memory
from vz_ray.plan.flops import BACKWARD, THROUGH
from vz_ray.plan.memory import GIB, Footprint
from vz_ray.plan.rank import Pass, host_bytes, largest_pass, rank_footprint, width_of
from vz_ray.plan.shape import ModelShape, processor_pixels, shape_of
from vz_ray.plan.trained import Trained, trained_of

Config: TypeAlias = RunConfig | SftRunConfig

H100_TFLOPS = 989.0
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
    peak_tflops: float = H100_TFLOPS
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
class Plan:
    """What a run takes.

    Attributes:
        command: `train` or `sft`.
        model: As the config names it.
        shape: Of that.
        trained: Weights that have gradients, those of adapters among them.
        longest: The longest episode that the config allows.
        usual: An episode as assumed.
        largest: The largest micro-batch.
        width: Bytes of a weight in the learner.
        learner: Of each rank's GPU.
        engine: Of each engine, where episodes are played.
        together: Of the one GPU that both share, with weights.transport ipc.
        host: Most host memory of a rank, bytes.
        groups: In an iteration, or a step of sft.
        samples: In a group.
        passes: How often each goes through the model.
        separate: An iteration's arithmetic, each trajectory as a sequence of its own.
        packed: The same with shared prefixes; None where a group has one sample.
        packs: Branches of each sequence that a group is packed into.
        notes: What a reader should know besides.
    """

    command: str
    model: str
    shape: ModelShape
    trained: int
    longest: EpisodeBudget
    usual: EpisodeBudget
    largest: Pass
    width: int
    learner: Footprint
    engine: EngineMemory | None
    together: Footprint | None
    host: int
    groups: int
    samples: int
    passes: work.Passes
    separate: work.Work
    packed: work.Work | None
    packs: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether every GPU holds what it must."""
        return self.learner_over <= 0 and self.engine_over <= 0

    @property
    def learner_over(self) -> int:
        """Bytes that a rank's GPU lacks; negative where there is room."""
        return (self.together or self.learner).over

    @property
    def engine_over(self) -> int:
        """Bytes that an engine's GPU lacks to start; negative where there is room."""
        if self.engine is None:
            return -self.learner.capacity
        lacking = (self.engine.needed - self.engine.kv_tokens) * self.engine.kv_bytes_per_token
        return max(self.engine.footprint.over, lacking)


def read(path: Path | None, overrides: list[str]) -> Config:
    """The config of a run of `train` or `sft`, whichever its keys belong to.

    Raises:
        UserError: A wrong key or value.
    """
    supervised = _has_key(path, "sft") or any(one.split("=")[0].split(".")[0] == "sft" for one in overrides)
    schema: type[Config] = SftRunConfig if supervised else RunConfig
    return load(schema, path, overrides)


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


def make_plan(config: Config, assumed: Assumptions, shape: ModelShape | None = None) -> Plan:
    """What a run of `config` takes; `shape` stands in for that of its model.

    Raises:
        UserError: The model is not known, its episodes do not fit their context, or a target of
            learner.lora is none of its layers.
    """
    shape = shape or shape_of(config.model)
    try:
        most = longest(config.episode, shape.vision)
        usual = episode_budget(
            config.episode, shape.vision, zooms=assumed.zooms, turn_tokens=assumed.turn_tokens
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    played = isinstance(config, RunConfig)
    settings = replace(config.learner, model=config.model)
    trained = trained_of(shape, settings)
    scored = settings.loss.kl > 0
    reference = scored and settings.own_reference
    groups, samples = _batch(config)
    largest = largest_pass(settings, most, usual, samples)
    learner = rank_footprint(shape, settings, largest, assumed.gpu_bytes, reference=reference)
    engine = _engine(config, shape, most, assumed.gpu_bytes) if isinstance(config, RunConfig) else None
    passes = _passes(config, groups, scored, trained)
    rate = work.Rate(settings.ranks, assumed.peak_tflops * 1e12, assumed.mfu)
    budget = max(settings.micro_batch_tokens, usual.tokens)
    packed = work.with_shared_prefixes(shape, usual, groups, samples, budget, passes, rate)
    return Plan(
        command="train" if played else "sft",
        model=config.model,
        shape=shape,
        trained=trained.elements,
        longest=most,
        usual=usual,
        largest=largest,
        width=width_of(settings),
        learner=learner,
        engine=engine,
        together=_together(config, learner, engine),
        host=host_bytes(shape, settings, reference=reference),
        groups=groups,
        samples=samples,
        passes=passes,
        separate=work.one_by_one(shape, usual, groups * samples, passes, rate),
        packed=packed if samples > 1 else None,
        packs=tuple(work.packs(usual, samples, budget)),
        notes=tuple(_notes(config, most, engine)),
    )


def _batch(config: Config) -> tuple[int, int]:
    """Groups, and samples in each."""
    if isinstance(config, RunConfig):
        return config.train.tasks, config.train.samples
    return config.sft.batch, 1


def _passes(config: Config, groups: int, scored: bool, trained: Trained) -> work.Passes:
    """As `vz_ray.learner.trainer` makes them: one update has its old log-probs from its own forward pass."""
    learner = config.learner
    scores, epochs = 0, 1
    if isinstance(config, RunConfig):
        epochs = learner.epochs
        once = groups <= learner.minibatch_tasks and epochs == 1
        scores = int(learner.old_logprobs == "recompute" and not once) + int(scored)
    backward = THROUGH if learner.lora.rank else BACKWARD
    vision = backward if trained.vision else 0
    return work.Passes(epochs, scores, learner.gradient_checkpointing, backward, vision)


def _engine(config: RunConfig, shape: ModelShape, most: EpisodeBudget, capacity: int) -> EngineMemory:
    return engine_memory(
        shape,
        config.rollout.engine,
        most,
        capacity,
        engines=config.rollout.most_workers,
        samples=config.train.samples,
        largest_image=processor_pixels(config.model),
    )


def _together(config: Config, learner: Footprint, engine: EngineMemory | None) -> Footprint | None:
    if engine is None or not isinstance(config, RunConfig) or config.weights.transport != "ipc":
        return None
    parts = (*learner.parts, *engine.footprint.parts)
    return Footprint("learner and engine", 1, learner.capacity, parts)


def _notes(config: Config, most: EpisodeBudget, engine: EngineMemory | None) -> list[str]:
    notes = []
    if most.uncut > most.tokens:
        notes.append(
            f"the longest episode would have {most.uncut:,} tokens, episode.max_context cuts it to "
            f"{most.tokens:,}"
        )
    if config.learner.dtype == "auto" and config.learner.zero_stage == 0:
        notes.append(
            "learner.zero_stage 0 trains float32 alone: on GPUs set learner.dtype=float32, or a stage"
        )
    if isinstance(config, RunConfig) and engine is not None:
        seats = min(config.rollout.episodes_per_worker, config.rollout.engine.max_num_seqs)
        if engine.starts and engine.shared < seats:
            notes.append(
                f"{engine.shared} longest episodes fit an engine's key/value cache at a time, and {seats} "
                "may be played: if so many grow so long, vLLM puts some back and computes them again"
            )
    return notes
